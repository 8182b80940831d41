#!lua flags=allow-oom
-- Takes files to delete: those of moves that were abandoned, those of consumed trajectories whose time is over. No move
-- can finish with them any more.
-- It makes room in the end, and so runs on a full server, too.
-- KEYS: run. ARGV: files at most.
-- Returns {'OK', names}.
local prefix = string.sub(KEYS[1], 1, -4)
local now = redis.call('TIME')[1]
local names = redis.call('ZRANGEBYSCORE', prefix .. 'unreferenced_files', '-inf', now, 'LIMIT', 0, ARGV[1])
for _, name in ipairs(names) do
  redis.call('HSET', prefix .. 'files', name, 'deleted')
end
return {'OK', names}
