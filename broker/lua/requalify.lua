-- A worker has found out more of what it claimed: a stock producer's message is keyed, needs room, or
-- isn't due; or another one needs more than its producer has said.
--
-- KEYS  claims    hash        this incarnation's claims            finish, put back
--       locks     hash        job key -> claim id or owed:<task>   finish
--       parked    sorted set  jobs that wait for a lock            hand on
--       sequence  counter     order of arrival                     nobody
--       delayed   sorted set  the queue's messages by due time     claim moves on
--       ready     list        served before the queues             claim
--       bell      list        wakes idle nodes                     the woken
--       waiting   sorted set  jobs that wait for a node they fit   claim
--       shapes    hash        shape -> how many wait               claim
--       claimed   hash        task id -> claim id                  finish, put back
-- ARGV  claim id, job key or '', due time in ms or '', needs or '', conflict, '1' if it fits this node
-- Returns 'locked' (run it), 'settled' (yours, and over); not yours any more: 'parked', 'delayed',
--         'waiting', 'superseded'.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], sequence = KEYS[4], delayed = KEYS[5],
    ready = KEYS[6], bell = KEYS[7], waiting = KEYS[8], shapes = KEYS[9],
    claimed = KEYS[10],
}
local id, key, due, needs, conflict, fits = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6] == '1'
local raw = redis.call('HGET', K.claims, id)
if not raw then
    return 'superseded'
end
local claim = decode(raw)
local function leave()
    redis.call('HDEL', K.claims, id)
    redis.call('HDEL', K.claimed, claim.task)
end
if due ~= '' and tonumber(due) > now_ms() then
    leave()
    redis.call('ZADD', K.delayed, due, claim.list .. '\0' .. claim.payload)
    if claim.key ~= '' then
        let_go(K, claim.key, id)
    end
    return 'delayed'
end
if claim.bare == '1' then
    claim.conflict = conflict
end
claim.key, claim.needs, claim.bare = key, needs, '0'
local holder = key ~= '' and redis.call('HGET', K.locks, key)
if holder and holder ~= id then
    if contend(K, claim) == 'parked' then
        leave()
        return 'parked'
    end
    redis.call('HSET', K.claims, id, encode(claim))
    return 'settled'
end
if not fits then
    leave()
    set_aside(K, claim)
    if holder then
        let_go(K, key, id)
    end
    ring(K)
    return 'waiting'
end
if key ~= '' then
    redis.call('HSET', K.locks, key, id)
end
redis.call('HSET', K.claims, id, encode(claim))
return 'locked'
