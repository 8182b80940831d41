#!lua
-- Creates groups and their empty trajectories; groups that exist, or were consumed lately, stay as they are.
-- KEYS: run. ARGV, per group: id, prompt id, iteration, packed prompt tokens, k, then k trajectory ids.
-- Returns {'OK', groups created}, {'NO_RUN'} or {'TRAJECTORY_TAKEN', trajectory id}; a refusal changes nothing.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)

local fresh = {}
local at = 1
while at <= #ARGV do
  local group_id, k = ARGV[at], tonumber(ARGV[at + 4])
  local known = redis.call('EXISTS', prefix .. 'group:' .. group_id) == 1
    or redis.call('ZSCORE', prefix .. 'consumed', group_id)
  if not known then
    fresh[#fresh + 1] = at
    for i = at + 5, at + 4 + k do
      if redis.call('EXISTS', prefix .. 'trajectory:' .. ARGV[i]) == 1 then
        return {'TRAJECTORY_TAKEN', ARGV[i]}
      end
    end
  end
  at = at + 5 + k
end

for _, first in ipairs(fresh) do
  local group_id, ids = ARGV[first], {}
  for i = first + 5, first + 4 + tonumber(ARGV[first + 4]) do
    ids[#ids + 1] = ARGV[i]
    redis.call('HSET', prefix .. 'trajectory:' .. ARGV[i], 'group', group_id, 'epoch', 0, 'tokens', 0, 'end', 0,
      'versions', '')
  end
  redis.call('HSET', prefix .. 'group:' .. group_id, 'prompt_id', ARGV[first + 1], 'iteration', ARGV[first + 2],
    'prompt', ARGV[first + 3], 'trajectories', cjson.encode(ids))
  redis.call('ZADD', prefix .. 'groups', redis.call('HINCRBY', KEYS[1], 'groups_made', 1), group_id)
end
return {'OK', #fresh}
