#!lua flags=no-writes
-- Reads how large images are.
-- KEYS: run. ARGV: digests.
-- Returns {'NO_RUN'}, {'NO_IMAGE', digest} or {'OK', bytes of each}.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local sizes = {}
for i = 1, #ARGV do
  sizes[i] = redis.call('HGET', prefix .. 'images', ARGV[i])
  if not sizes[i] then
    return {'NO_IMAGE', ARGV[i]}
  end
end
return {'OK', sizes}
