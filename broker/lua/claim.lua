-- Claim some messages: out of the queues and into this node's hash, with their locks, in one step.
--
-- KEYS  claims      hash        this incarnation's claims            finish, put back delete fields
--       locks       hash        job key -> claim id or owed:<task>   finish
--       parked      sorted set  jobs that wait for a lock            hand on
--       ready       list        served before the queues             claim
--       sequence    counter     order of arrival                     nobody
--       deliveries  hash        task id -> lost deliveries           finish
--       bell        list        wakes idle nodes                     the woken
--       leases      sorted set  incarnation -> end of its lease      reap, leave
--       dead        hash        what isn't a task message, by name   an operator
--       waiting     sorted set  jobs that wait for a node they fit   claim
--       shapes      hash        shape -> how many wait               claim
--       reserved    hash        incarnation -> shape NUL rank of the job that it keeps room for
--                                                                    claim, reap
--       settled     hash        task id -> why it has an outcome without having run   finish, sweep
--       spare       hash        incarnation -> what it has left      reap
--       claimed     hash        task id -> claim id                  finish, put back
--       then for each queue its delayed set, then the lists in the order in which to serve them
-- ARGV  incarnation; how a claim id begins; the number of the first one; how many at most; the node
--       (JSON: total and spare are [cpus, memory, gpus], labels, slots: idle processes of its pool,
--       ahead: how many us of work may be claimed ahead, takes: task name -> us, patience in ms);
--       number of queues; the queues' names; then for each list the name of its queue and the last
--       priority that it serves
-- Returns {word, claim, ...}: 'expelled'; 'again' (a limit was reached, there may be more), 'busy' (no
--       process is idle) or 'all';
--       each claim is {number, queue, payload, lost deliveries, key, '0' if its worker must find out
--       what it needs, needs, settled, list}.

local K = {
    claims = KEYS[1], locks = KEYS[2], parked = KEYS[3], ready = KEYS[4], sequence = KEYS[5],
    deliveries = KEYS[6], bell = KEYS[7], leases = KEYS[8], dead = KEYS[9], waiting = KEYS[10],
    shapes = KEYS[11], reserved = KEYS[12], settled = KEYS[13], spare = KEYS[14],
    claimed = KEYS[15],
}
local OTHERS = 15
local member, prefix, first, most = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local node, count = cjson.decode(ARGV[5]), tonumber(ARGV[6])
local now = now_ms()

local lease = redis.call('ZSCORE', K.leases, member)
if not lease or tonumber(lease) < now then
    return {'expelled'}
end

-- Asked a second time, since the first reply was lost: what it was then. --

local any_lost
local function told(number, claim)
    if any_lost == nil then
        any_lost = redis.call('EXISTS', K.deliveries) == 1
    end
    local lost = any_lost and redis.call('HGET', K.deliveries, claim.task) or '0'
    local qualified = claim.bare == '1' and '0' or '1'
    return {number, claim.queue, claim.payload, lost, claim.key, qualified, claim.needs, claim.settled,
        claim.list}
end

local reply, numbers, ids = {'all'}, {}, {}
if redis.call('HLEN', K.claims) > most then
    for i = 1, most do
        numbers[i] = first + i - 1
    end
else  -- What it holds is fewer, and mostly nothing.
    for _, id in ipairs(redis.call('HKEYS', K.claims)) do
        local number = string.sub(id, 1, #prefix) == prefix and tonumber(string.sub(id, #prefix + 1))
        if number and number >= first and number < first + most then
            numbers[#numbers + 1] = number
        end
    end
    table.sort(numbers)
end
for i, number in ipairs(numbers) do
    ids[i] = prefix .. string.format('%d', number)
end
for i, raw in ipairs(#ids > 0 and redis.call('HMGET', K.claims, unpack(ids)) or {}) do
    if raw then
        reply[#reply + 1] = told(numbers[i], decode(raw))
    end
end
if #reply > 1 then
    reply[1] = 'again'
    return reply
end

-- Mostly nothing is queued and nothing waits: then that was it. --

local shortest
for _, takes in pairs(node.takes) do
    shortest = math.min(shortest or takes, takes)
end
local function is_busy()
    return node.slots <= 0 and not (shortest and shortest <= node.ahead)
end

local function tell_what_is_spare()
    local left = string.format('%d %d %d', node.spare[1], node.spare[2], node.spare[3])
    if redis.call('HGET', K.spare, member) ~= left then
        redis.call('HSET', K.spare, member, left)
    end
end

if redis.call('EXISTS', K.ready, K.reserved, K.shapes, unpack(KEYS, OTHERS + 1)) == 0 then
    tell_what_is_spare()
    return {is_busy() and 'busy' or 'all'}
end

-- What this node has room for. --

local served, queue_of, top_of, lists = {}, {}, {}, {}
for i = 1, count do
    served[ARGV[6 + i]] = true
end
for i = 1, #KEYS - OTHERS - count do
    lists[i] = KEYS[OTHERS + count + i]
    queue_of[lists[i]] = ARGV[6 + count + 2 * i - 1]
    top_of[lists[i]] = ARGV[6 + count + 2 * i]
end

local labels, parsed = {}, {}
for _, label in ipairs(node.labels) do
    labels[label] = true
end

local function needs_of(text)
    local needs = parsed[text]
    if not needs then
        local cpus, memory, gpus, wanted = string.match(text, '^(%d+) (%d+) (%d+) ?(.*)$')
        needs = { tonumber(cpus) or 0, tonumber(memory) or 0, tonumber(gpus) or 0, possible = true }
        for label in string.gmatch(wanted or '', '[^,]+') do
            needs.possible = needs.possible and labels[label] ~= nil
        end
        for i = 1, 3 do
            needs.possible = needs.possible and needs[i] <= node.total[i]
        end
        parsed[text] = needs
    end
    return needs
end

local function fits_now(needs)
    if node.slots <= 0 then
        return false
    end
    for i = 1, 3 do
        if needs[i] > 0 and needs[i] > node.spare[i] then
            return false
        end
    end
    return needs.possible
end

-- Whether it may be claimed: there is room, or it is short and may wait here for a moment.
local function fits(claim)
    if claim.settled ~= '' then
        return true
    end
    local needs = needs_of(claim.needs)
    if fits_now(needs) then
        return true
    end
    local takes = needs.possible and node.takes[claim.name]
    return takes and takes <= node.ahead
end

local found, index = {}, {}
local function take(claim)
    local number = first + #reply - 1
    local id = prefix .. string.format('%d', number)
    if claim.settled == '' then
        if claim.key ~= '' then
            redis.call('HSET', K.locks, claim.key, id)
        end
        local needs = needs_of(claim.needs)
        if not fits_now(needs) then
            node.ahead = node.ahead - (node.takes[claim.name] or 0)
        end
        for i = 1, 3 do
            node.spare[i] = node.spare[i] - needs[i]
        end
        node.slots = node.slots - 1
    end
    found[#found + 1] = id
    found[#found + 1] = encode(claim)
    index[#index + 1] = claim.task
    index[#index + 1] = id
    reply[#reply + 1] = told(number, claim)
end

local any_settled
local just_settled = {}
local function settle(claim)
    if any_settled == nil then
        any_settled = redis.call('EXISTS', K.settled) == 1
    end
    if any_settled and claim.settled == '' then
        -- <ms> <why>
        claim.settled = string.match(redis.call('HGET', K.settled, claim.task) or '', '^%d+ (.*)$') or ''
        just_settled[claim] = claim.settled ~= ''
    end
end

-- A claim that isn't the lock's: locked, parked, over or set aside. `class` as in `set_aside`.
local function admit(claim, class)
    settle(claim)
    if claim.settled ~= '' then
        take(claim)
        return
    end
    local holder = claim.key ~= '' and redis.call('HGET', K.locks, claim.key)
    if holder and holder ~= 'owed:' .. claim.task then
        if contend(K, claim) == 'settled' then
            take(claim)
        end
    elseif fits(claim) then
        take(claim)
    else
        set_aside(K, claim, class)
    end
end

-- One that is owed its lock, or came back.
local function admit_first(claim)
    settle(claim)
    if just_settled[claim] and claim.key ~= '' then
        let_go(K, claim.key, 'owed:' .. claim.task)
    end
    admit(claim, '0')
end

local function is_full()
    return #reply > most or is_busy()
end

-- The job that this node keeps room for, if there is one still. --

local function rank_of(head, shape)
    local from = #shape + 2
    return string.sub(head, from, string.find(head, '\0', from, true) - 1)
end

local kept = redis.call('HGET', K.reserved, member)
local keeps_room = false
if kept then
    local head = redis.call('ZRANGEBYLEX', K.waiting, '[' .. kept .. '\0', '(' .. kept .. '\1', 'LIMIT', 0, 1)[1]
    local claim = head and decode(string.sub(head, #kept + 2))
    if claim then
        settle(claim)
    end
    if head and claim.settled == '' and not fits_now(needs_of(claim.needs)) then
        keeps_room = true
    else
        redis.call('HDEL', K.reserved, member)
        if head then
            fetch_back(K, string.sub(kept, 1, string.find(kept, '\0', 1, true) - 1), head)
            admit_first(claim)
        end
    end
end

-- First what is owed a lock or came back. --

local looked = 0
if not keeps_room then
    for _, raw in ipairs(redis.call('LRANGE', K.ready, 0, 99)) do
        if is_full() then
            break
        end
        local claim = decode(raw)
        redis.call('LREM', K.ready, 1, raw)
        looked = looked + 1
        if served[claim.queue] then
            admit_first(claim)
        else
            set_aside(K, claim, '0')  -- What stands behind it mustn't wait for its queue's nodes.
        end
    end
end

-- Then what has become due joins its queue. --

for i = 1, count do
    local due = redis.call('ZRANGEBYSCORE', KEYS[OTHERS + i], '-inf', now, 'LIMIT', 0, 50)
    for _, message in ipairs(due) do
        local cut = string.find(message, '\0', 1, true)
        redis.call('LPUSH', string.sub(message, 1, cut - 1), string.sub(message, cut + 1))
    end
    if #due > 0 then
        redis.call('ZREM', KEYS[OTHERS + i], unpack(due))
    end
end

-- Then the queues, at each priority first those that have waited for a node such as this one. --

local heads
local function head_of(shape)
    local head = redis.call('ZRANGEBYLEX', K.waiting, '[' .. shape .. '\0', '(' .. shape .. '\1', 'LIMIT', 0, 1)[1]
    if not head then
        return nil
    end
    local rank = rank_of(head, shape)
    return { member = head, rank = rank, claim = decode(string.sub(head, #shape + #rank + 3)) }
end

-- Who has waited too long gets the first node that could run it: it takes nothing until there is room.
local function keep_room_for(shape, head)
    if kept or keeps_room or now - tonumber(string.sub(head.rank, -13)) < node.patience then
        return
    end
    local mark = shape .. '\0' .. head.rank
    for _, other in ipairs(redis.call('HVALS', K.reserved)) do
        if other == mark then
            return
        end
    end
    redis.call('HSET', K.reserved, member, mark)
    keeps_room = true
end

local function look_at_shapes()
    heads = {}
    local all = redis.call('HKEYS', K.shapes)
    for _, shape in ipairs(all) do
        local cut = string.find(shape, '\1', 1, true)
        if served[string.sub(shape, 1, cut - 1)] and needs_of(string.sub(shape, cut + 1)).possible then
            local head = head_of(shape)
            if head then
                heads[shape] = head
                settle(head.claim)
                if not fits(head.claim) then
                    keep_room_for(shape, head)
                end
            end
        end
    end
end

local function serve_waiting(top)
    while not is_full() do
        local best
        for shape, head in pairs(heads) do
            if (string.sub(head.rank, 1, 1) == '0' or string.sub(head.rank, 2, 2) <= top)
                and (not best or head.rank < heads[best].rank) and fits(head.claim) then
                best = shape
            end
        end
        if not best or looked == 200 then
            return
        end
        looked = looked + 1
        local head = heads[best]
        fetch_back(K, best, head.member)
        if string.sub(head.rank, 1, 1) == '0' then
            admit_first(head.claim)
        else
            admit(head.claim)
        end
        heads[best] = head_of(best)
    end
end

local function is_task(message)
    local headers, properties = message.headers, message.properties
    return type(headers) == 'table' and type(headers.id) == 'string'
        and type(properties) == 'table' and type(properties.delivery_tag) == 'string'
        and not (type(headers.cohort) == 'table' and type(headers.cohort.key) == 'string'
            and string.find(headers.cohort.key, '\0', 1, true))
end

local function text_of(value)
    return type(value) == 'string' and value or ''
end

local function claim_of(list, payload)
    local whole, message = pcall(cjson.decode, payload)
    if not (whole and type(message) == 'table' and is_task(message)) then
        redis.call('HSET', K.dead, 'element-' .. redis.sha1hex(payload), cjson.encode({
            reason = 'it is no task message', time = string.format('%d', now), queue = queue_of[list],
            list = list }) .. '\0' .. payload)
        return nil
    end
    local ours = type(message.headers.cohort) == 'table'
    local about = ours and message.headers.cohort or {}
    local priority = tonumber(message.properties.priority) or 0
    if priority ~= priority then
        priority = 0  -- NaN is no number of digits
    end
    local conflict = text_of(about.conflict)
    return {
        queue = queue_of[list],
        list = list,
        key = text_of(about.key),
        task = message.headers.id,
        name = text_of(message.headers.task),
        priority = string.format('%d', math.max(0, math.min(9, priority))),
        needs = text_of(about.needs),
        conflict = conflict == '' and 'wait' or conflict,
        bare = ours and '0' or '1',
        settled = '',
        payload = payload,
    }
end

if not keeps_room then
    look_at_shapes()
end
for _, list in ipairs(lists) do
    if keeps_room then
        break
    end
    serve_waiting(top_of[list])
    while not is_full() and looked < 200 do
        local payload = redis.call('RPOP', list)
        if not payload then
            break
        end
        looked = looked + 1
        local claim = claim_of(list, payload)
        if claim then
            admit(claim)
        end
    end
end
if not keeps_room and #lists > 0 then
    serve_waiting('9')
end

if #found > 0 then
    redis.call('HSET', K.claims, unpack(found))
    redis.call('HSET', K.claimed, unpack(index))
end
tell_what_is_spare()
if #reply > most or looked >= 200 then
    reply[1] = 'again'
elseif is_busy() then
    reply[1] = 'busy'
end
return reply
