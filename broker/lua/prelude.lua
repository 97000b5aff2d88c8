-- What several scripts share. The scripts below name their keys K.locks, K.parked and so on.
--
-- A claim is JSON with strings only, so that decoding and encoding it loses nothing:
--   queue    the queue's name             list     the Redis list it was taken from
--   key      the job key, '' for none     task     the task id
--   priority '0'..'9', 0 served first     payload  the message as its producer wrote it
--   bare     '1': of a stock producer, its worker hasn't looked yet whether it is keyed; else '0'
--
-- A lock is free (no field), claimed (a claim id) or owed ('owed:<task id>'); who is owed it
-- stands in `ready`. Transitions:
--   free -> claimed     claim, requalify
--   claimed -> owed     finish (to the first parked), put back (to the one that came back)
--   claimed -> free     finish, with nobody parked
--   owed -> claimed     claim, out of `ready`

local function now_ms()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function ring(K)
    -- A bell is only a hint: a hundred of them wake everybody there is to wake.
    if redis.call('LLEN', K.bell) < 100 then
        redis.call('LPUSH', K.bell, '1')
    end
end

local function park(K, claim)
    local order = string.format('%s%015d', claim.priority, redis.call('INCR', K.sequence))
    redis.call('ZADD', K.parked, 0, claim.key .. '\0' .. order .. '\0' .. cjson.encode(claim))
end

local function next_parked(K, key)
    local prefix = key .. '\0'
    local found = redis.call('ZRANGEBYLEX', K.parked, '[' .. prefix, '(' .. key .. '\1', 'LIMIT', 0, 1)
    if not found[1] then
        return nil
    end
    redis.call('ZREM', K.parked, found[1])
    -- <priority><15 digits> NUL follows the prefix.
    return cjson.decode(string.sub(found[1], #prefix + 18))
end

-- The lock of `key` is let go by its holder: it goes to whoever has waited longest.
local function hand_on(K, key)
    local heir = next_parked(K, key)
    if heir then
        redis.call('HSET', K.locks, key, 'owed:' .. heir.task)
        redis.call('RPUSH', K.ready, cjson.encode(heir))
        ring(K)
    else
        redis.call('HDEL', K.locks, key)
    end
end

-- Only the holder lets go: a run whose lock was taken away must not free its successor's. A lock
-- that was taken away and given to nobody is let go as well, or those parked behind it would stay.
local function let_go(K, key, id)
    local holder = redis.call('HGET', K.locks, key)
    if not holder or holder == id then
        hand_on(K, key)
    end
end

-- A claim goes back, ahead of everything that waits. `lost`: its node or process died with it.
local function put_back(K, claims, id, lost)
    local raw = redis.call('HGET', claims, id)
    if not raw then
        return false
    end
    local claim = cjson.decode(raw)
    redis.call('HDEL', claims, id)
    if lost then
        redis.call('HINCRBY', K.deliveries, claim.task, 1)
    end
    if claim.key ~= '' then
        local holder = redis.call('HGET', K.locks, claim.key)
        if holder and holder ~= id then
            -- The lock was taken away meanwhile; whoever has it now will hand it on.
            park(K, claim)
            return true
        end
        redis.call('HSET', K.locks, claim.key, 'owed:' .. claim.task)
    end
    redis.call('LPUSH', K.ready, raw)
    ring(K)
    return true
end
