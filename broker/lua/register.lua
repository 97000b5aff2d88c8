-- A worker begins its life: one lease for this incarnation.
--
-- KEYS  leases  sorted set  incarnation -> end of its lease   reap, leave
--       nodes   hash        incarnation -> what it is         reap, leave
--       birth   string      names this Redis until it is emptied   nobody
-- ARGV  incarnation, length of the lease in ms, description (JSON), a name for this Redis if it has none
-- Returns the name of this Redis.

redis.call('ZADD', KEYS[1], now_ms() + tonumber(ARGV[2]), ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('SET', KEYS[3], ARGV[4], 'NX')
return redis.call('GET', KEYS[3])
