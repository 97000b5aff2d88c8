-- A worker begins its life: one lease for this incarnation.
--
-- KEYS  leases  sorted set  incarnation -> end of its lease   reap, leave
--       nodes   hash        incarnation -> what it is         reap, leave
-- ARGV  incarnation, length of the lease in ms, description (JSON)

redis.call('ZADD', KEYS[1], now_ms() + tonumber(ARGV[2]), ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return 'registered'
