#!lua flags=allow-oom
-- Takes a finished trajectory that is to be moved to a file, and keeps in mind the file's name before there is a file.
-- It makes room in the end, and so runs on a full server, too.
-- KEYS: run. ARGV: file name, seconds after which the move is taken for abandoned.
-- Returns {'NO_RUN'}, {'OK'} when no trajectory waits, or {'OK', id, tokens, bytes of a token's expert choices}.
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
local held = redis.call('HMGET', prefix .. 'trajectory:' .. id, 'tokens', 'expert_bytes')
return {'OK', id, held[1], held[2] or '0'}
