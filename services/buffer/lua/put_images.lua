#!lua
-- Takes pieces of images, in order, and keeps each image for a while from now on.
-- KEYS: run. ARGV: bytes that the run's images may take, seconds to keep them unreferenced, then per piece: digest,
--   bytes of the whole image, offset, content ('' to ask), '1' when the content is the whole, verified file, else '0'.
-- Returns {'NO_RUN'} or {'OK', outcome of each piece}, the outcomes being 'whole', 'stored' (whole by this piece),
--   'partial', 'complete SERIAL' (all bytes are here and not verified), 'gap OFFSET', 'conflict' (dropped), 'size BYTES'
--   or 'full BYTES'.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local limit, until_s = tonumber(ARGV[1]), tonumber(redis.call('TIME')[1]) + tonumber(ARGV[2])

local function keep(digest)
  redis.call('ZADD', prefix .. 'unreferenced', until_s, digest)
end

-- Reserves room for an image in place of `held` bytes; returns the bytes that are taken where there is too little.
local function reserve(bytes, held)
  local taken = tonumber(redis.call('HGET', KEYS[1], 'image_bytes') or 0) - held
  if taken + bytes > limit then
    return taken
  end
  redis.call('HINCRBY', KEYS[1], 'image_bytes', bytes - held)
end

local function put_whole(digest, bytes, content, held)
  local taken = reserve(bytes, held)
  if taken then
    return 'full ' .. string.format('%d', taken)
  end
  redis.call('SET', prefix .. 'image:' .. digest, content)
  redis.call('HDEL', prefix .. 'arriving', digest)
  redis.call('HSET', prefix .. 'images', digest, bytes)
  keep(digest)
  return 'stored'
end

local function put_piece(digest, bytes, offset, content, held_bytes, serial)
  local key = prefix .. 'image:' .. digest
  local held = redis.call('STRLEN', key)
  local common = math.min(offset + #content, held) - offset
  if common < 0 then
    return 'gap ' .. string.format('%d', held)
  elseif common > 0 and redis.call('GETRANGE', key, offset, offset + common - 1) ~= string.sub(content, 1, common) then
    redis.call('UNLINK', key)
    redis.call('HDEL', prefix .. 'arriving', digest)
    redis.call('ZREM', prefix .. 'unreferenced', digest)
    redis.call('HINCRBY', KEYS[1], 'image_bytes', -held_bytes)
    return 'conflict'
  end
  if not serial then
    local taken = reserve(bytes, 0)
    if taken then
      return 'full ' .. string.format('%d', taken)
    end
    serial = string.format('%d', redis.call('HINCRBY', KEYS[1], 'images_begun', 1))
    redis.call('HSET', prefix .. 'arriving', digest, bytes .. ' ' .. serial)
  end
  if offset + #content > held then
    redis.call('APPEND', key, string.sub(content, common + 1))
    held = offset + #content
  end
  keep(digest)
  if held == bytes then
    return 'complete ' .. serial
  end
  return 'partial'
end

local function put(digest, bytes, offset, content, verified)
  local whole = tonumber(redis.call('HGET', prefix .. 'images', digest) or -1)
  if whole == bytes then
    keep(digest)
    return 'whole'
  elseif whole >= 0 then
    return 'size ' .. string.format('%d', whole)
  end
  local held_bytes, serial = string.match(redis.call('HGET', prefix .. 'arriving', digest) or '', '(%d+) (%d+)')
  held_bytes = tonumber(held_bytes or 0)
  if verified == '1' then
    return put_whole(digest, bytes, content, held_bytes)
  elseif serial and held_bytes ~= bytes then
    return 'size ' .. string.format('%d', held_bytes)
  elseif content == '' and not serial then
    return 'partial'
  end
  return put_piece(digest, bytes, offset, content, held_bytes, serial)
end

local outcomes = {}
for i = 3, #ARGV, 5 do
  outcomes[#outcomes + 1] = put(ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 4])
end
return {'OK', outcomes}
