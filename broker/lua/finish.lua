-- A claim has ended: acknowledge it, and hand its lock on to the first that waits.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
-- ARGV  claim id
-- Returns 'finished', or 'superseded': the claim was reaped, another delivery decides.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], deliveries = KEYS[5],
    bell = KEYS[6],
}
local id = ARGV[1]
local raw = redis.call('HGET', K.claims, id)
if not raw then
    return 'superseded'
end
local claim = cjson.decode(raw)
redis.call('HDEL', K.claims, id)
redis.call('HDEL', K.deliveries, claim.task)
if claim.key ~= '' then
    let_go(K, claim.key, id)
end
return 'finished'
