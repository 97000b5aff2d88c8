-- Put some messages into their queues, in order, or aside until they are due. A message that was
-- put before, under the same mark, isn't put again.
--
-- KEYS  bell     list        wakes idle nodes                          the woken
--       expiring sorted set  task id -> when it is over, in ms         finish, the expiry
--       then for each place
--       list     list        the queue, at the messages' priority      claim pops
--       delayed  sorted set  the queue's messages by due time          claim moves on
--       then for each message that has a mark, in order
--       marks    hash        mark -> when it is forgotten, in seconds  put; it expires
-- ARGV  number of places, how long a mark is kept in ms; the channel of events, '' for none, and
--       what is told there; packed for each message: its mark (10 bytes, all zero for none), its
--       place, when it is due in ms (0: now); '' or, as JSON, {number, task id, ms} of each message
--       that expires; then the messages
-- Returns for each message 'queued', 'delayed' or 'there'.

local K = { bell = KEYS[1], expiring = KEYS[2] }
local places, keep, packed = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[5]
local now = now_ms()
local seconds = math.floor(now / 1000)
local forgotten = struct.pack('<I4', math.ceil((now + keep) / 1000))
local unmarked = string.rep('\0', 10)

-- What is forgotten is dropped when a hash has doubled: it holds at most twice what it must.
local function drop_forgotten(marks, size)
    if size < 16 or size ~= 2 ^ math.floor(math.log(size) / math.log(2) + 0.5) then
        return
    end
    local held = redis.call('HGETALL', marks)
    for i = 1, #held, 2 do
        if struct.unpack('<I4', held[i + 1]) <= seconds then
            redis.call('HDEL', marks, held[i])
        end
    end
end

local function was_put(marks, mark)
    local held = redis.call('HGET', marks, mark)
    if held and struct.unpack('<I4', held) > seconds then
        return true
    end
    if redis.call('HSET', marks, mark, forgotten) == 1 then
        drop_forgotten(marks, redis.call('HLEN', marks))
    end
    -- As a whole it lives as long as the longest of its marks, and a minute: not told every time.
    if redis.call('PTTL', marks) < keep then
        redis.call('PEXPIRE', marks, keep + 60000)
    end
    return false
end

local reply, next_marks, queued, new = {}, 3 + 2 * places, 0, 0
for i = 1, #ARGV - 6 do
    local mark, place, due, there = struct.unpack('<c10Bd', packed, 19 * (i - 1) + 1)
    if mark ~= unmarked then
        there = was_put(KEYS[next_marks], mark)
        next_marks = next_marks + 1
    else
        there = false
    end
    local list = KEYS[3 + 2 * place]
    new = new + (there and 0 or 1)
    if there then
        reply[i] = 'there'
    elseif due > now then
        redis.call('ZADD', KEYS[4 + 2 * place], due, list .. '\0' .. ARGV[i + 6])
        reply[i] = 'delayed'
    else
        redis.call('LPUSH', list, ARGV[i + 6])
        reply[i] = 'queued'
        queued = queued + 1
    end
end

if ARGV[6] ~= '' then
    for _, one in ipairs(cjson.decode(ARGV[6])) do
        if reply[one[1]] ~= 'there' then
            redis.call('ZADD', K.expiring, one[3], one[2])
        end
    end
end

-- A bell is only a hint: a hundred of them wake everybody there is to wake.
for _ = 1, math.min(queued, 100) do
    if redis.call('LPUSH', K.bell, '1') > 100 then
        redis.call('LPOP', K.bell)
        break
    end
end
if new > 0 and ARGV[3] ~= '' then
    redis.call('PUBLISH', ARGV[3], ARGV[4])
end
return reply
