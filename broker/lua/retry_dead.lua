-- A dead letter goes back into its queue, as a new task.
--
-- KEYS  dead  hash  task id -> why and when, NUL, the message   an operator
--       list  list  the queue, at the message's priority        claim pops
--       bell  list  wakes idle nodes                            the woken
-- ARGV  its old task id, what stands there, its new message
-- Returns 'retried', or 'gone': somebody else has retried or dropped it, or it died anew.

local K = { dead = KEYS[1], list = KEYS[2], bell = KEYS[3] }
if redis.call('HGET', K.dead, ARGV[1]) ~= ARGV[2] then
    return 'gone'
end
redis.call('HDEL', K.dead, ARGV[1])
redis.call('LPUSH', K.list, ARGV[3])
ring(K)
return 'retried'
