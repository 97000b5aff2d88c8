-- Tell what state a task is in: to the index, and to everybody who waits for it.
--
-- KEYS  outcome  string  the task's meta, as Celery's Redis backend keeps it   its time to live
-- ARGV  meta (JSON), time to live in ms or '0' for ever
-- Returns 'announced', or 'kept': the first final outcome of a task stands.

local final = { SUCCESS = true, FAILURE = true, REVOKED = true }
local held = redis.call('GET', KEYS[1])
if held then
    local whole, meta = pcall(cjson.decode, held)
    if whole and type(meta) == 'table' and final[meta.status] then
        return 'kept'
    end
end
if ARGV[2] == '0' then
    redis.call('SET', KEYS[1], ARGV[1])
else
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 'announced'
