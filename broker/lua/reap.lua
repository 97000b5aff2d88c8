-- Return the claims of an incarnation: its lease has ended, or it leaves of its own will.
--
-- KEYS  claims      hash        that incarnation's claims            this script
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       sequence    counter     order of arrival                    nobody
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       claimed     hash        task id -> claim id                  finish, put back
--       leases      sorted set  incarnation -> end of its lease      this script
--       nodes       hash        incarnation -> what it is            this script
--       spare       hash        incarnation -> what it has left      this script
--       reserved    hash        incarnation -> what it keeps room for  this script
--       own bell    list        wakes this node                      this script
-- ARGV  incarnation, '1' if it leaves by itself
-- Returns {'alive'}, {'more', n} (the limit of 200 was reached) or {'reaped', n}.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], sequence = KEYS[5],
    deliveries = KEYS[6], bell = KEYS[7], claimed = KEYS[8], leases = KEYS[9], nodes = KEYS[10],
    spare = KEYS[11], reserved = KEYS[12], own_bell = KEYS[13],
}
local member, leaves = ARGV[1], ARGV[2] == '1'
local lease = redis.call('ZSCORE', K.leases, member)
if lease and tonumber(lease) >= now_ms() and not leaves then
    return {'alive'}
end
local back = 0
for _, id in ipairs(redis.call('HKEYS', K.claims)) do
    if back == 200 then
        return {'more', back}
    end
    put_back(K, K.claims, id, not leaves)
    back = back + 1
end
redis.call('ZREM', K.leases, member)
redis.call('HDEL', K.nodes, member)
redis.call('HDEL', K.spare, member)
redis.call('HDEL', K.reserved, member)
redis.call('DEL', K.own_bell)
return {'reaped', back}
