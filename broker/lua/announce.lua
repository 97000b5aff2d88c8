-- Tell what state tasks are in: to everybody who waits for them, and for a while to who asks.
--
-- KEYS  outcomes  string  a task's meta, under Celery's own key   its time to live
--       buckets   hash    one for each outcome: id -> where it lies     sweep, forget
-- ARGV  how many tasks, time to live in ms or '0' for ever, then for each task its meta, the id's field
--       in its bucket and the entry that says "final, not on disk yet", or '' for a state on the way
-- Returns for each task 'announced'; 'kept': a final outcome stands, on disk; or {meta}: this final
-- outcome stands, and whoever was to write it down may have died before that.

local final = { SUCCESS = true, FAILURE = true, REVOKED = true }
local count, lives = tonumber(ARGV[1]), ARGV[2]
local now = now_ms()

local function announce(name, bucket, meta, field, entry)
    local indexed = redis.call('HGET', bucket, field)
    if indexed then
        local segment, _, _, _, ends = struct.unpack('<I4I4I4BI4', indexed)
        if ends ~= 0 and ends * 1000 < now then
            indexed = nil
        elseif segment > 0 then
            return 'kept'
        end
    end
    local held = redis.call('GET', name)
    if held and held == meta then
        return 'announced'  -- The first reply to this was lost.
    end
    if held then
        local stands = indexed
        if not stands then
            local whole, decoded = pcall(cjson.decode, held)
            stands = whole and type(decoded) == 'table' and final[decoded.status]
        end
        if stands then
            return {held}
        end
    end
    if entry ~= '' then
        redis.call('HSET', bucket, field, entry)
    end
    if lives == '0' then
        redis.call('SET', name, meta)
    else
        redis.call('SET', name, meta, 'PX', lives)
    end
    redis.call('PUBLISH', name, meta)
    return 'announced'
end

local words = {}
for i = 1, count do
    local at = 3 * i
    words[i] = announce(KEYS[i], KEYS[count + i], ARGV[at], ARGV[at + 1], ARGV[at + 2])
end
return words
