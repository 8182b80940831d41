#!lua
-- Has files that are in the run's folder and that nobody knows deleted after a while: those that were made after the
-- snapshot from which the run was restored.
-- KEYS: run. ARGV: seconds to keep them, then names.
-- Returns {'NO_RUN'} or {'OK', files that nobody knew}.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local until_s = tonumber(redis.call('TIME')[1]) + tonumber(ARGV[1])
local adopted = 0
for i = 2, #ARGV do
  if redis.call('HSETNX', prefix .. 'files', ARGV[i], 'unknown') == 1 then
    redis.call('ZADD', prefix .. 'unreferenced_files', until_s, ARGV[i])
    adopted = adopted + 1
  end
end
return {'OK', adopted}
