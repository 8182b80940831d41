#!lua
-- Creates groups and their empty trajectories; groups that exist, or were consumed lately, stay as they are.
-- KEYS: run. ARGV, per group: id, prompt id, iteration, packed prompt tokens, digests of its images with a blank between,
--   k, then k trajectory ids.
-- Returns {'OK', groups created}, {'NO_RUN'}, {'TRAJECTORY_TAKEN', trajectory id} or {'IMAGES_MISSING', group id, digest};
--   a refusal changes nothing.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)

local fresh = {}
local at = 1
while at <= #ARGV do
  local group_id, k = ARGV[at], tonumber(ARGV[at + 5])
  local known = redis.call('EXISTS', prefix .. 'group:' .. group_id) == 1
    or redis.call('ZSCORE', prefix .. 'consumed', group_id)
  if not known then
    fresh[#fresh + 1] = at
    for i = at + 6, at + 5 + k do
      if redis.call('EXISTS', prefix .. 'trajectory:' .. ARGV[i]) == 1 then
        return {'TRAJECTORY_TAKEN', ARGV[i]}
      end
    end
    for digest in string.gmatch(ARGV[at + 4], '%x+') do
      if redis.call('HEXISTS', prefix .. 'images', digest) == 0 then
        return {'IMAGES_MISSING', group_id, digest}
      end
    end
  end
  at = at + 6 + k
end

for _, first in ipairs(fresh) do
  local group_id, ids = ARGV[first], {}
  for i = first + 6, first + 5 + tonumber(ARGV[first + 5]) do
    ids[#ids + 1] = ARGV[i]
    redis.call('HSET', prefix .. 'trajectory:' .. ARGV[i], 'group', group_id, 'epoch', 0, 'tokens', 0, 'end', 0,
      'versions', '')
  end
  redis.call('HSET', prefix .. 'group:' .. group_id, 'prompt_id', ARGV[first + 1], 'iteration', ARGV[first + 2],
    'prompt', ARGV[first + 3], 'trajectories', cjson.encode(ids))
  if ARGV[first + 4] ~= '' then
    redis.call('HSET', prefix .. 'group:' .. group_id, 'images', ARGV[first + 4])
    for digest in string.gmatch(ARGV[first + 4], '%x+') do
      redis.call('HINCRBY', prefix .. 'references', digest, 1)
      redis.call('ZREM', prefix .. 'unreferenced', digest)
    end
  end
  redis.call('ZADD', prefix .. 'groups', redis.call('HINCRBY', KEYS[1], 'groups_made', 1), group_id)
end
return {'OK', #fresh}
