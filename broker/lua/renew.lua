-- Renew a lease, and take back the claims of which its worker knows nothing: their replies were lost.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       sequence    counter     order of arrival of parked jobs      nobody
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       claimed     hash        task id -> claim id                  finish, put back
--       leases      sorted set  incarnation -> end of its lease      reap, leave
-- ARGV  incarnation, length of the lease in ms, the number of the last claim it had asked for when
--       it sent this, then the claim ids that the worker knows
-- Returns 'renewed', or 'expelled': the lease is gone and so are its claims.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], sequence = KEYS[5],
    deliveries = KEYS[6], bell = KEYS[7], claimed = KEYS[8], leases = KEYS[9],
}
if not redis.call('ZSCORE', K.leases, ARGV[1]) then
    return 'expelled'
end
redis.call('ZADD', K.leases, now_ms() + tonumber(ARGV[2]), ARGV[1])
local known = {}
for i = 4, #ARGV do
    known[ARGV[i]] = true
end
for _, id in ipairs(redis.call('HKEYS', K.claims)) do
    -- A claim asked for since then is younger than what it said; the next renewal speaks of it.
    if not known[id] and tonumber(string.match(id, '%d+$') or 0) <= tonumber(ARGV[3]) then
        put_back(K, K.claims, id, false)
    end
end
return 'renewed'
