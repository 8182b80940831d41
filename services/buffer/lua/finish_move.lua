#!lua flags=allow-oom
-- Puts a whole file in the place of tokens of a trajectory: one change, or none. What came after them stays in Redis.
-- It makes room in the end, and so runs on a full server, too.
-- KEYS: run. ARGV: file name, trajectory id, first token in the file, the one after its last or '' when it cannot be
--   written, for the next one to try, tokens in Redis from which on they are to be moved.
-- Returns {'OK', 1}, or {'OK', 0} when the move was taken for abandoned, or the tokens are consumed or moved already;
--   then the file is swept.
local prefix = string.sub(KEYS[1], 1, -4)
local name, id, first, stop, least = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
if redis.call('HGET', prefix .. 'files', name) ~= 'writing' then
  return {'OK', 0}
end
local key = prefix .. 'trajectory:' .. id
local held = redis.call('HMGET', key, 'tokens', 'files', 'expert_bytes')
if not stop then
  redis.call('ZADD', prefix .. 'unmoved', 'XX', 0, id)
end
if not stop or not held[1] or tonumber(string.match(held[2] or '', ':(%d+)$') or 0) ~= first then
  redis.call('ZADD', prefix .. 'unreferenced_files', 0, name)
  return {'OK', 0}
end

local function drop(kind, bytes)
  local string_key = prefix .. kind .. ':' .. id
  local rest = redis.call('GETRANGE', string_key, (stop - first) * bytes, -1)
  if rest == '' then
    redis.call('UNLINK', string_key)
  else
    redis.call('SET', string_key, rest)
  end
end

redis.call('HSET', key, 'files', (held[2] and held[2] .. ',' or '') .. name .. ':' .. string.format('%d', stop))
redis.call('HSET', prefix .. 'files', name, 'held')
redis.call('ZREM', prefix .. 'unreferenced_files', name)
drop('tokens', 4)
drop('logprobs', 4)
if held[3] then
  drop('experts', tonumber(held[3]))
end
if tonumber(held[1]) - stop < least then
  redis.call('ZREM', prefix .. 'unmoved', id)
else -- a segment has ended meanwhile, or is about to
  redis.call('ZADD', prefix .. 'unmoved', 0, id)
end
return {'OK', 1}
