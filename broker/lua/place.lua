-- Say where outcomes lie that are on disk now.
--
-- KEYS  segments  hash  'last' -> the highest number; 's<name>' -> number; 'n<number>' -> name  drop
--       then buckets    hash  id -> where the outcome lies                              sweep, forget
-- ARGV  the segment's name, then for each bucket its entries: a field of 14 bytes, then 17 bytes of
--       which the first 4, the segment's number, are filled in here
-- Returns how many stand there now that didn't. What lies on disk already stands.

local number = redis.call('HGET', KEYS[1], 's' .. ARGV[1])
if not number then
    number = redis.call('HINCRBY', KEYS[1], 'last', 1)
    redis.call('HSET', KEYS[1], 's' .. ARGV[1], number, 'n' .. number, ARGV[1])
end
local prefix = struct.pack('<I4', tonumber(number))
local now = now_ms()
local placed = 0
for i = 2, #KEYS do
    local entries = ARGV[i]
    for at = 1, #entries, 31 do
        local field = string.sub(entries, at, at + 13)
        local entry = prefix .. string.sub(entries, at + 18, at + 30)
        if redis.call('HSETNX', KEYS[i], field, entry) == 1 then
            placed = placed + 1
        else
            local segment, _, _, _, ends = struct.unpack('<I4I4I4BI4', redis.call('HGET', KEYS[i], field))
            if segment == 0 or (ends ~= 0 and ends * 1000 < now) then
                redis.call('HSET', KEYS[i], field, entry)
                placed = placed + 1
            end
        end
    end
end
return placed
