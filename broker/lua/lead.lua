-- Take or keep a duty: one leader at a time.
--
-- KEYS  leader  string  who leads   its time to live
-- ARGV  token of the candidate, length of the lease in ms
-- Returns 'leading' or 'following'.

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
    return 'following'
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 'leading'
