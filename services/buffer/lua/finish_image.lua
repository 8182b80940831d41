#!lua
-- Makes an image whose bytes were verified a whole one, or drops one whose bytes are not those of its digest.
-- KEYS: run. ARGV: digest, serial of the arrival that was read, '1' to keep or '0' to drop.
-- Returns {'OK', 1 or 0, 1 or 0}: whether it was done, and whether the image is whole; another arrival's bytes stay as
--   they are.
local prefix = string.sub(KEYS[1], 1, -4)
local bytes, serial = string.match(redis.call('HGET', prefix .. 'arriving', ARGV[1]) or '', '(%d+) (%d+)')
if serial ~= ARGV[2] then
  return {'OK', 0, redis.call('HEXISTS', prefix .. 'images', ARGV[1])}
end
redis.call('HDEL', prefix .. 'arriving', ARGV[1])
if ARGV[3] == '1' then
  redis.call('HSET', prefix .. 'images', ARGV[1], bytes)
else
  redis.call('UNLINK', prefix .. 'image:' .. ARGV[1])
  redis.call('ZREM', prefix .. 'unreferenced', ARGV[1])
  redis.call('HINCRBY', KEYS[1], 'image_bytes', -bytes)
end
return {'OK', 1, tonumber(ARGV[3])}
