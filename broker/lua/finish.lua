-- Claims have ended: acknowledge them, and hand each lock on to the first that waits.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       claimed     hash        task id -> claim id                  finish, put back
--       own bell    list        wakes this node: it has room         the woken, reap
--       settled     hash        task id -> why it never ran          finish, sweep
--       expiring    sorted set  task id -> when it is over, in ms    finish, the expiry
--       shapes      hash        shape -> how many wait for a node    claim
-- ARGV  claim ids, at most 200
-- Returns for each 'finished', or 'superseded': it was reaped, another delivery decides.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], deliveries = KEYS[5],
    bell = KEYS[6], claimed = KEYS[7], own_bell = KEYS[8], settled = KEYS[9], expiring = KEYS[10],
    shapes = KEYS[11],
}
local words, over = {}, {}
for i, raw in ipairs(redis.call('HMGET', K.claims, unpack(ARGV))) do
    words[i] = 'superseded'
    -- Twice in one call is once.
    if raw and redis.call('HDEL', K.claims, ARGV[i]) == 1 then
        words[i] = 'finished'
        local claim = decode(raw)
        over[#over + 1] = claim.task
        unlock(K, claim, ARGV[i])
    end
end
for _, marks in ipairs({ K.claimed, K.deliveries, K.settled }) do
    if #over > 0 and redis.call('EXISTS', marks) == 1 then
        redis.call('HDEL', marks, unpack(over))
    end
end
if #over > 0 and redis.call('EXISTS', K.expiring) == 1 then
    redis.call('ZREM', K.expiring, unpack(over))
end
-- Only what waits for room has reason to look again: all else has rung, or will. Nobody takes the
-- bell of an incarnation away that was reaped before.
if #over > 0 and redis.call('EXISTS', K.shapes) == 1 and redis.call('LLEN', K.own_bell) == 0 then
    redis.call('LPUSH', K.own_bell, '1')
end
return words
