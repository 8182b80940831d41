#!lua
-- Deletes images that no group names and whose time is over.
-- KEYS: run. ARGV: images at most.
-- Returns {'OK', images looked at, whole images deleted, their bytes}.
local prefix = string.sub(KEYS[1], 1, -4)
local now = redis.call('TIME')[1]
local deleted, freed = 0, 0
local over = redis.call('ZRANGEBYSCORE', prefix .. 'unreferenced', '-inf', '(' .. now, 'LIMIT', 0, ARGV[1])
for _, digest in ipairs(over) do
  redis.call('ZREM', prefix .. 'unreferenced', digest)
  if redis.call('HEXISTS', prefix .. 'references', digest) == 0 then
    local bytes = redis.call('HGET', prefix .. 'images', digest)
    if bytes then
      deleted, freed = deleted + 1, freed + bytes
    else
      bytes = string.match(redis.call('HGET', prefix .. 'arriving', digest), '%d+')
    end
    redis.call('UNLINK', prefix .. 'image:' .. digest)
    redis.call('HDEL', prefix .. 'images', digest)
    redis.call('HDEL', prefix .. 'arriving', digest)
    redis.call('HINCRBY', KEYS[1], 'image_bytes', -bytes)
  end
end
return {'OK', #over, deleted, freed}
