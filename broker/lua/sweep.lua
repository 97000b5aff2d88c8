-- Take what has expired out of some buckets of the index.
--
-- KEYS  buckets  hash  id -> where the outcome lies   sweep, forget
-- Returns how many went.

local now, gone = now_ms(), 0
for _, bucket in ipairs(KEYS) do
    local held = redis.call('HGETALL', bucket)
    for i = 1, #held, 2 do
        local _, _, _, _, ends = struct.unpack('<I4I4I4BI4', held[i + 1])
        if ends ~= 0 and ends * 1000 < now then
            redis.call('HDEL', bucket, held[i])
            gone = gone + 1
        end
    end
end
return gone
