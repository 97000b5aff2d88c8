-- Put a message into its queue, or aside until it is due.
--
-- KEYS  list     list        the queue, at the message's priority   claim pops
--       delayed  sorted set  the queue's messages by due time       claim moves on
--       bell     list        wakes idle nodes                       the woken
-- ARGV  message, due time in ms or ''

local K = { list = KEYS[1], delayed = KEYS[2], bell = KEYS[3] }
if ARGV[2] ~= '' and tonumber(ARGV[2]) > now_ms() then
    redis.call('ZADD', K.delayed, ARGV[2], K.list .. '\0' .. ARGV[1])
    return 'delayed'
end
redis.call('LPUSH', K.list, ARGV[1])
ring(K)
return 'queued'
