#!lua flags=allow-oom
-- Puts a whole file in the place of a trajectory's tokens: one change, or none.
-- It makes room in the end, and so runs on a full server, too.
-- KEYS: run. ARGV: file name, trajectory id, tokens in the file; '' when it cannot be written, for the next one to try.
-- Returns {'OK', 1}, or {'OK', 0} when the move was taken for abandoned, or the trajectory is consumed or moved already;
--   then the file is swept.
local prefix = string.sub(KEYS[1], 1, -4)
if redis.call('HGET', prefix .. 'files', ARGV[1]) ~= 'writing' then
  return {'OK', 0}
end
local key = prefix .. 'trajectory:' .. ARGV[2]
local held = redis.call('HMGET', key, 'tokens', 'file')
if ARGV[3] == '' then
  redis.call('ZADD', prefix .. 'unmoved', 'XX', 0, ARGV[2])
end
if held[1] ~= ARGV[3] or held[2] then
  redis.call('ZADD', prefix .. 'unreferenced_files', 0, ARGV[1])
  return {'OK', 0}
end
redis.call('HSET', key, 'file', ARGV[1])
redis.call('HSET', prefix .. 'files', ARGV[1], 'held')
redis.call('ZREM', prefix .. 'unreferenced_files', ARGV[1])
redis.call('ZREM', prefix .. 'unmoved', ARGV[2])
redis.call('UNLINK', prefix .. 'tokens:' .. ARGV[2], prefix .. 'logprobs:' .. ARGV[2], prefix .. 'experts:' .. ARGV[2])
return {'OK', 1}
