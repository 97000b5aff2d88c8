-- A claim has ended in an outcome that somebody should look into: acknowledged, and kept aside.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       claimed     hash        task id -> claim id                  finish, put back
--       dead        hash        task id -> why and when, NUL, the message   an operator
--       expiring    sorted set  task id -> when it is over, in ms    finish, the expiry
-- ARGV  claim id, why
-- Returns 'finished', or 'superseded': the claim was reaped, another delivery decides.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], deliveries = KEYS[5],
    bell = KEYS[6], claimed = KEYS[7], dead = KEYS[8], expiring = KEYS[9],
}
local id, reason = ARGV[1], ARGV[2]
local claim = take_out(K, id)
if not claim then
    return 'superseded'
end
redis.call('HSET', K.dead, claim.task, cjson.encode({
    reason = reason, time = string.format('%d', now_ms()), queue = claim.queue, list = claim.list,
    lost = redis.call('HGET', K.deliveries, claim.task) or '0' }) .. '\0' .. claim.payload)
redis.call('HDEL', K.deliveries, claim.task)
redis.call('ZREM', K.expiring, claim.task)
unlock(K, claim, id)
return 'finished'
