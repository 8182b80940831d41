#!lua flags=no-writes
-- Reads ranges of images, those that are not whole yet included.
-- KEYS: run. ARGV, per range: digest, first byte, last byte.
-- Returns {'OK', content of each}, shorter where an image was deleted meanwhile.
local prefix = string.sub(KEYS[1], 1, -4)
local contents = {}
for i = 1, #ARGV, 3 do
  contents[#contents + 1] = redis.call('GETRANGE', prefix .. 'image:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
return {'OK', contents}
