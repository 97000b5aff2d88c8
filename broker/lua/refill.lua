-- Say where outcomes lie that were found on disk, many at once.
--
-- KEYS  segments  hash  'filling' -> who fills this Redis; numbers and names of segments   drop
--       then buckets    hash  id -> where the outcome lies                            sweep, forget
-- ARGV  who fills it, then for each bucket its entries: a field of 14 bytes, then 17 bytes
-- Returns how many stand there now that didn't; -1 if this Redis was emptied since the filling began,
-- so that the segments' numbers in the entries mean nothing. What lies on disk already stands.

if redis.call('HGET', KEYS[1], 'filling') ~= ARGV[1] then
    return -1
end
local placed = 0
for i = 2, #KEYS do
    local bucket, entries = KEYS[i], ARGV[i]
    for at = 1, #entries, 31 do
        local field, entry = string.sub(entries, at, at + 13), string.sub(entries, at + 14, at + 30)
        if redis.call('HSETNX', bucket, field, entry) == 1 then
            placed = placed + 1
        elseif string.sub(redis.call('HGET', bucket, field), 1, 4) == '\0\0\0\0' then
            redis.call('HSET', bucket, field, entry)
            placed = placed + 1
        end
    end
end
return placed
