#!lua flags=no-writes
-- Reads one page of the prompts' statistics, in the order of their ids.
-- KEYS: run. ARGV: prompt id to start after ('' for the first page), prompts at most.
-- Returns {'NO_RUN'} or {'OK', JSON}: [[prompt id, 'trajectories correct'], ...].
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local from = '-'
if ARGV[1] ~= '' then
  from = '(' .. ARGV[1]
end
local page = {}
for _, id in ipairs(redis.call('ZRANGEBYLEX', prefix .. 'prompts', from, '+', 'LIMIT', 0, ARGV[2])) do
  page[#page + 1] = {id, redis.call('HGET', prefix .. 'statistics', id)}
end
if #page == 0 then
  return {'OK', '[]'}
end
return {'OK', cjson.encode(page)}
