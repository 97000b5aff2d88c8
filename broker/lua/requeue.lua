-- A claim has ended and its task is to be tried again: acknowledged and put in one step.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       claimed     hash        task id -> claim id                  finish, put back
--       list        list        the queue, at the message's priority claim pops
--       delayed     sorted set  the queue's messages by due time     claim moves on
--       expiring    sorted set  task id -> when it is over, in ms    finish, the expiry
-- ARGV  claim id, message, due time in ms or '', when it expires in ms or '' for as before
-- Returns 'finished', or 'superseded': the claim was reaped, another delivery decides.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], deliveries = KEYS[5],
    bell = KEYS[6], claimed = KEYS[7], list = KEYS[8], delayed = KEYS[9], expiring = KEYS[10],
}
local id, message, due, expires = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local claim = take_out(K, id)
if not claim then
    return 'superseded'
end
redis.call('HDEL', K.deliveries, claim.task)
if due ~= '' and tonumber(due) > now_ms() then
    redis.call('ZADD', K.delayed, due, K.list .. '\0' .. message)
else
    redis.call('LPUSH', K.list, message)
    ring(K)
end
if expires ~= '' then
    redis.call('ZADD', K.expiring, expires, claim.task)
end
unlock(K, claim, id)
return 'finished'
