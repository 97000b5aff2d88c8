-- A node is back in touch after its lease had ended: what it still runs and nobody took is its again.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back
--       locks       hash        job key -> claim id or owed:<task>   finish
--       ready       list        served before the queues             claim
--       claimed     hash        task id -> claim id                  finish, put back
-- ARGV  '1' if this Redis has been emptied since it was claimed; then for each claim, at most 50: its
--       id, the task id, its facts (JSON), the message
-- Returns for each 'adopted', or 'taken': another has it or its lock, or has brought it to its end.

local K = { claims = KEYS[1], locks = KEYS[2], ready = KEYS[3], claimed = KEYS[4] }

local emptied = ARGV[1] == '1'
-- Where it went when the lease had ended: nobody has come by it yet.
local came_back = {}
for _, raw in ipairs(redis.call('LRANGE', K.ready, 0, 199)) do
    came_back[decode(raw).payload] = raw
end

local words = {}
for at = 2, #ARGV, 4 do
    local id, task, claim = ARGV[at], ARGV[at + 1], cjson.decode(ARGV[at + 2])
    claim.payload = ARGV[at + 3]
    local raw = came_back[claim.payload]
    claim = raw and decode(raw) or claim
    local keyed = claim.key ~= '' and claim.settled == ''
    local holder = keyed and redis.call('HGET', K.locks, claim.key)
    if (redis.call('HGET', K.claimed, task) or 'back') ~= 'back' or not (raw or emptied)
        or (holder and not (raw and holder == 'owed:' .. task)) then
        words[#words + 1] = 'taken'
    else
        if raw then
            redis.call('LREM', K.ready, 1, raw)
            came_back[claim.payload] = nil
        end
        if keyed then
            redis.call('HSET', K.locks, claim.key, id)
        end
        redis.call('HSET', K.claims, id, encode(claim))
        redis.call('HSET', K.claimed, task, id)
        words[#words + 1] = 'adopted'
    end
end
return words
