#!lua flags=allow-oom
-- Forgets files that are deleted.
-- It makes room in the end, and so runs on a full server, too.
-- KEYS: run. ARGV: names.
-- Returns {'OK'}.
local prefix = string.sub(KEYS[1], 1, -4)
for i = 1, #ARGV do
  if redis.call('HGET', prefix .. 'files', ARGV[i]) == 'deleted' then
    redis.call('HDEL', prefix .. 'files', ARGV[i])
    redis.call('ZREM', prefix .. 'unreferenced_files', ARGV[i])
  end
end
return {'OK'}
