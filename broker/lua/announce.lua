-- Tell what state a task is in: to everybody who waits for it, and for a while to who asks.
--
-- KEYS  outcome  string  the task's meta, under Celery's own key       its time to live
--       bucket   hash    optional: id -> where the outcome lies        sweep, forget
-- ARGV  meta, time to live in ms or '0' for ever; with a bucket also: the id's field in it, and the
--       entry that says "final, not on disk yet", or '' for a state on the way
-- Returns {'announced'}; {'kept'}: a final outcome stands, on disk; or {'adopt', meta}: a final
-- outcome stands here, and whoever was to write it down may have died before that.

local final = { SUCCESS = true, FAILURE = true, REVOKED = true }
local indexed = KEYS[2] and redis.call('HGET', KEYS[2], ARGV[3])
if indexed then
    local segment, _, _, _, ends = struct.unpack('<I4I4I4BI4', indexed)
    if ends ~= 0 and ends * 1000 < now_ms() then
        indexed = nil
    elseif segment > 0 then
        return {'kept'}
    end
end
local held = redis.call('GET', KEYS[1])
if held and held == ARGV[1] then
    return {'announced'}  -- The first reply to this was lost.
end
if held then
    local stands = indexed
    if not stands then
        local whole, meta = pcall(cjson.decode, held)
        stands = whole and type(meta) == 'table' and final[meta.status]
    end
    if stands then
        return {'adopt', held}
    end
end
if KEYS[2] and ARGV[4] ~= '' then
    redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
end
if ARGV[2] == '0' then
    redis.call('SET', KEYS[1], ARGV[1])
else
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return {'announced'}
