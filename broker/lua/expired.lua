-- Tasks whose time was up have been seen to: take them out, unless they have been given more time.
--
-- KEYS  expiring  sorted set  task id -> when it is over, in ms   finish, the expiry
-- ARGV  task id, when it was over; the next one; ...; at most 200 of them
-- Returns how many went.

local gone = 0
for i = 1, #ARGV, 2 do
    local ends = redis.call('ZSCORE', KEYS[1], ARGV[i])
    if ends and tonumber(ends) == tonumber(ARGV[i + 1]) then
        redis.call('ZREM', KEYS[1], ARGV[i])
        gone = gone + 1
    end
end
return gone
