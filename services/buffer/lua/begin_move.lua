#!lua flags=allow-oom
-- Takes a trajectory of which tokens are to be moved to a file, and keeps in mind the file's name before there is a file.
-- It makes room in the end, and so runs on a full server, too.
-- KEYS: run. ARGV: file name, seconds after which the move is taken for abandoned.
-- Returns {'NO_RUN'}, {'OK'} when no trajectory waits, or {'OK', id, first token, tokens held, bytes of a token's expert
--   choices}: the tokens from the first on are in Redis.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local now = tonumber(redis.call('TIME')[1])
local until_s = now + tonumber(ARGV[2])
local id = redis.call('ZRANGEBYSCORE', prefix .. 'unmoved', '-inf', now, 'LIMIT', 0, 1)[1]
if not id then
  return {'OK'}
end
redis.call('ZADD', prefix .. 'unmoved', until_s, id)
redis.call('HSET', prefix .. 'files', ARGV[1], 'writing')
redis.call('ZADD', prefix .. 'unreferenced_files', until_s, ARGV[1])
local held = redis.call('HMGET', prefix .. 'trajectory:' .. id, 'files', 'tokens', 'expert_bytes')
return {'OK', id, string.match(held[1] or '', ':(%d+)$') or '0', held[2], held[3] or '0'}
