-- A message of a stock producer was claimed bare; its worker has found out that it is keyed, or not due.
--
-- KEYS  claims    hash        this incarnation's claims            finish, put back
--       locks     hash        job key -> claim id or owed:<task>   finish
--       parked    sorted set  jobs that wait for a lock            hand on
--       sequence  counter     order of arrival of parked jobs      nobody
--       delayed   sorted set  the queue's messages by due time     claim moves on
--       ready     list        served before the queues             claim
--       bell      list        wakes idle nodes                     the woken
-- ARGV  claim id, job key or '', due time in ms or ''
-- Returns 'locked' (run it), 'parked', 'delayed' (not yours any more) or 'superseded'.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], sequence = KEYS[4], delayed = KEYS[5],
    ready = KEYS[6], bell = KEYS[7],
}
local id, key, due = ARGV[1], ARGV[2], ARGV[3]
local raw = redis.call('HGET', K.claims, id)
if not raw then
    return 'superseded'
end
local claim = cjson.decode(raw)
if due ~= '' and tonumber(due) > now_ms() then
    redis.call('HDEL', K.claims, id)
    redis.call('ZADD', K.delayed, due, claim.list .. '\0' .. claim.payload)
    if claim.key ~= '' then
        let_go(K, claim.key, id)
    end
    return 'delayed'
end
claim.key, claim.bare = key, '0'
if key ~= '' then
    local holder = redis.call('HGET', K.locks, key)
    if holder and holder ~= id then
        redis.call('HDEL', K.claims, id)
        park(K, claim)
        return 'parked'
    end
    redis.call('HSET', K.locks, key, id)
end
redis.call('HSET', K.claims, id, cjson.encode(claim))
return 'locked'
