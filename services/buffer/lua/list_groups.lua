#!lua flags=no-writes
-- Reads one page of the groups not consumed yet, oldest first.
-- KEYS: run. ARGV: position to start after, groups at most.
-- Returns {'NO_RUN'} or {'OK', JSON}: [[position, group id, prompt id, iteration,
--   [[trajectory id, tokens, epoch, end reason, verdict, reward, versions], ...]], ...], numbers as text.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local page = {}
local members = redis.call('ZRANGEBYSCORE', prefix .. 'groups', '(' .. ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
for i = 1, #members, 2 do
  local group = redis.call('HMGET', prefix .. 'group:' .. members[i], 'prompt_id', 'iteration', 'trajectories')
  local rows = {}
  for _, id in ipairs(cjson.decode(group[3])) do
    local held = redis.call('HMGET', prefix .. 'trajectory:' .. id, 'tokens', 'epoch', 'end', 'verdict', 'reward', 'versions')
    rows[#rows + 1] = {id, held[1], held[2], held[3], held[4] or '', held[5] or '', held[6]}
  end
  page[#page + 1] = {members[i + 1], members[i], group[1], group[2], rows}
end
if #page == 0 then
  return {'OK', '[]'}
end
return {'OK', cjson.encode(page)}
