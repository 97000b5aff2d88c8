-- Claim one message: out of the queues and into this node's hash, with its lock, in one step.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back delete fields
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       sequence    counter     order of arrival of parked jobs      nobody
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       leases      sorted set  incarnation -> end of its lease      reap, leave
--       dead        list        what isn't a task message            an operator
--       then for each queue its delayed set, then the lists in the order in which to serve them
-- ARGV  incarnation, claim id, number of queues, then the queues' names, then for each list the
--       name of its queue
-- Returns {'claimed', queue, payload, lost deliveries, key, '0' if its worker must find the key},
--         {'nothing'}, {'again'} (the limit of 200 messages was reached) or {'expelled'}.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], sequence = KEYS[5],
    deliveries = KEYS[6], bell = KEYS[7], leases = KEYS[8], dead = KEYS[9],
}
local member, id, count = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_ms()

local lease = redis.call('ZSCORE', K.leases, member)
if not lease or tonumber(lease) < now then
    return {'expelled'}
end

local served, queue_of, lists = {}, {}, {}
for i = 1, count do
    served[ARGV[3 + i]] = true
end
for i = 1, #KEYS - 9 - count do
    lists[i] = KEYS[9 + count + i]
    queue_of[lists[i]] = ARGV[3 + count + i]
end

local function tell(claim)
    local lost = redis.call('HGET', K.deliveries, claim.task) or '0'
    local qualified = claim.bare == '1' and '0' or '1'
    return {'claimed', claim.queue, claim.payload, lost, claim.key, qualified}
end

local function take(claim)
    if claim.key ~= '' then
        redis.call('HSET', K.locks, claim.key, id)
    end
    redis.call('HSET', K.claims, id, cjson.encode(claim))
    return tell(claim)
end

-- Asked a second time, since the first reply was lost: what it was then.
local held = redis.call('HGET', K.claims, id)
if held then
    return tell(cjson.decode(held))
end

-- First what is owed a lock or came back.
local first = redis.call('LRANGE', K.ready, 0, 49)
local theirs = 0
for _, raw in ipairs(first) do
    local claim = cjson.decode(raw)
    if served[claim.queue] then
        redis.call('LREM', K.ready, 1, raw)
        local holder = claim.key ~= '' and redis.call('HGET', K.locks, claim.key)
        if holder and holder ~= 'owed:' .. claim.task then
            -- The lock it was owed is gone (an operator, a failover) and somebody else has it.
            park(K, claim)
        else
            return take(claim)
        end
    else
        theirs = theirs + 1
    end
end
if theirs == 50 then
    -- Their queues may have no node at all: what stands behind them mustn't wait for one.
    for _ = 1, theirs do
        redis.call('LMOVE', K.ready, K.ready, 'LEFT', 'RIGHT')
    end
end

-- Then what has become due joins its queue.
for i = 1, count do
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[9 + i], '-inf', now, 'LIMIT', 0, 20)) do
        local cut = string.find(member, '\0', 1, true)
        redis.call('ZREM', KEYS[9 + i], member)
        redis.call('LPUSH', string.sub(member, 1, cut - 1), string.sub(member, cut + 1))
    end
end

local looked = 0
for _, list in ipairs(lists) do
    while true do
        if looked == 200 then
            return {'again'}
        end
        local payload = redis.call('RPOP', list)
        if not payload then
            break
        end
        looked = looked + 1
        local whole, message = pcall(cjson.decode, payload)
        local headers = whole and type(message) == 'table' and message.headers
        if type(headers) ~= 'table' or type(headers.id) ~= 'string'
            or type(message.properties) ~= 'table' or type(message.properties.delivery_tag) ~= 'string'
            or (type(headers.cohort) == 'table' and type(headers.cohort.key) == 'string'
                and string.find(headers.cohort.key, '\0', 1, true)) then
            redis.call('LPUSH', K.dead, payload)
            redis.call('LTRIM', K.dead, 0, 999)
        else
            local ours = type(headers.cohort) == 'table'
            local priority = tonumber(message.properties.priority) or 0
            if priority ~= priority then
                priority = 0  -- NaN is no number of digits
            end
            local claim = {
                queue = queue_of[list],
                list = list,
                key = ours and type(headers.cohort.key) == 'string' and headers.cohort.key or '',
                task = headers.id,
                priority = string.format('%d', math.max(0, math.min(9, priority))),
                payload = payload,
                bare = ours and '0' or '1',
            }
            if claim.key ~= '' and redis.call('HEXISTS', K.locks, claim.key) == 1 then
                park(K, claim)
            else
                return take(claim)
            end
        end
    end
end
return {'nothing'}
