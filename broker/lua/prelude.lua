-- What several scripts share. The scripts below name their keys K.locks, K.parked and so on.
--
-- A claim is its facts, NUL, and the message as its producer wrote it. The facts are JSON with
-- strings only, so that decoding and encoding them loses nothing:
--   queue    the queue's name             list     the Redis list it was taken from
--   key      the job key, '' for none     task     the task id
--   priority '0'..'9', 0 served first     name     the task's name
--   needs    '' or '<cpus> <memory> <gpus> <label>,<label>'
--   conflict 'wait', 'skip' or 'replace': what happens when its key is locked
--   bare     '1': of a stock producer, its worker hasn't looked yet what it needs; else '0'
--   settled  '' or why it has an outcome without having run: it needs no lock and no room
--
-- A lock is free (no field), claimed (a claim id) or owed ('owed:<task id>'); who is owed it
-- stands in `ready` or in `waiting`. Transitions:
--   free -> claimed     claim, requalify
--   claimed -> owed     finish (to the first parked), put back (to the one that came back)
--   claimed -> free     finish, with nobody parked
--   owed -> claimed     claim
--
-- A claimed message that doesn't fit the node that looked at it waits for one that it fits:
--   waiting  sorted set  scores 0: <shape> NUL <rank> NUL <claim>
--   shapes   hash        shape -> how many wait
-- where a shape is <queue> \1 <needs>, and a rank is '0', or '1' and the priority, then 15 digits of
-- the order of arrival and 13 of the time in ms: those ranked '0' are served before the queues.

local function now_ms()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function encode(claim)
    local payload = claim.payload
    claim.payload = nil
    local text = cjson.encode(claim) .. '\0' .. payload
    claim.payload = payload
    return text
end

local function decode(raw)
    local cut = string.find(raw, '\0', 1, true)
    local claim = cjson.decode(string.sub(raw, 1, cut - 1))
    claim.payload = string.sub(raw, cut + 1)
    return claim
end

local function ring(K)
    -- A bell is only a hint: a hundred of them wake everybody there is to wake.
    if redis.call('LLEN', K.bell) < 100 then
        redis.call('LPUSH', K.bell, '1')
    end
end

local function arrival(K)
    return string.format('%015d', redis.call('INCR', K.sequence))
end

local function park(K, claim)
    redis.call('ZADD', K.parked, 0,
        claim.key .. '\0' .. claim.priority .. arrival(K) .. '\0' .. encode(claim))
end

local function parked_behind(K, key, most)
    local prefix = key .. '\0'
    return redis.call('ZRANGEBYLEX', K.parked, '[' .. prefix, '(' .. key .. '\1', 'LIMIT', 0, most),
        #prefix + 18  -- <priority><15 digits> NUL follows the prefix.
end

-- The lock of `key` is let go by its holder: it goes to whoever has waited longest.
local function hand_on(K, key)
    local found, at = parked_behind(K, key, 1)
    if found[1] then
        redis.call('ZREM', K.parked, found[1])
        local heir = decode(string.sub(found[1], at))
        redis.call('HSET', K.locks, key, 'owed:' .. heir.task)
        redis.call('RPUSH', K.ready, encode(heir))
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

-- A claim has ended: it, or nil if it was reaped. Its lock is still its own.
local function take_out(K, id)
    local raw = redis.call('HGET', K.claims, id)
    if not raw then
        return nil
    end
    local claim = decode(raw)
    redis.call('HDEL', K.claims, id)
    redis.call('HDEL', K.claimed, claim.task)
    return claim
end

-- Hand its lock on, if it has one: what is settled never took it.
local function unlock(K, claim, id)
    if claim.key ~= '' and claim.settled == '' then
        let_go(K, claim.key, id)
    end
end

-- A claim goes back, ahead of everything that waits. `lost`: its node or process died with it.
local function put_back(K, claims, id, lost)
    local raw = redis.call('HGET', claims, id)
    if not raw then
        return false
    end
    local claim = decode(raw)
    redis.call('HDEL', claims, id)
    -- It may have begun, and even have committed: nobody but a node that has read its log can say
    -- that it never ran.
    redis.call('HSET', K.claimed, claim.task, 'back')
    if lost then
        redis.call('HINCRBY', K.deliveries, claim.task, 1)
    end
    if claim.key ~= '' and claim.settled == '' then
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

-- It waits for a node that it fits.
local function set_aside(K, claim, class)
    local shape = claim.queue .. '\1' .. claim.needs
    local rank = (class or '1' .. claim.priority) .. arrival(K) .. string.format('%013d', now_ms())
    redis.call('ZADD', K.waiting, 0, shape .. '\0' .. rank .. '\0' .. encode(claim))
    redis.call('HINCRBY', K.shapes, shape, 1)
end

local function fetch_back(K, shape, member)
    redis.call('ZREM', K.waiting, member)
    if redis.call('HINCRBY', K.shapes, shape, -1) <= 0 then
        redis.call('HDEL', K.shapes, shape)
    end
end

-- Its key is locked by another. 'parked', or 'settled': it is over.
local function contend(K, claim)
    if claim.conflict == 'skip' then
        claim.settled = 'skipped: its key was locked'
        return 'settled'
    end
    if claim.conflict == 'replace' then
        local found, at = parked_behind(K, claim.key, 100)
        for _, member in ipairs(found) do
            local other = decode(string.sub(member, at))
            if other.name == claim.name then
                redis.call('ZREM', K.parked, member)
                other.settled = 'replaced by ' .. claim.task
                redis.call('RPUSH', K.ready, encode(other))
                ring(K)
            end
        end
    end
    park(K, claim)
    return 'parked'
end
