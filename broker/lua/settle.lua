-- Whoever asks says that a task has an outcome, without its having run: wherever its message waits, it
-- is met by a node one day, which sees this and doesn't run it.
--
-- KEYS  claimed  hash  task id -> claim id, or 'back'       finish
--       settled  hash  task id -> <ms> <why>                finish, sweep
-- ARGV  task id, why
-- Returns 'settled', or 'running': a node has it or had it, and what became of it only a node can say.

if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
    return 'running'
end
redis.call('HSETNX', KEYS[2], ARGV[1], string.format('%d %s', now_ms(), ARGV[2]))
return 'settled'
