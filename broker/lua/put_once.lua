-- Put a journaled job into its queue, unless that was done before: by its producer, or by whoever
-- found it in the journal after Redis had lost it.
--
-- KEYS  marker   string      this delivery was put                    its time to live
--       list     list        the queue, at the message's priority     claim pops
--       delayed  sorted set  the queue's messages by due time         claim moves on
--       bell     list        wakes idle nodes                         the woken
-- ARGV  message, due time in ms or '', the marker's time to live in ms
-- Returns 'there' if it was put before, else 'delayed' or 'queued'.

local K = { list = KEYS[2], delayed = KEYS[3], bell = KEYS[4] }
if not redis.call('SET', KEYS[1], '1', 'NX', 'PX', ARGV[3]) then
    return 'there'
end
if ARGV[2] ~= '' and tonumber(ARGV[2]) > now_ms() then
    redis.call('ZADD', K.delayed, ARGV[2], K.list .. '\0' .. ARGV[1])
    return 'delayed'
end
redis.call('LPUSH', K.list, ARGV[1])
ring(K)
return 'queued'
