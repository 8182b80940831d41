#!lua flags=allow-oom
-- Closes an iteration: removes the consumed groups with their tokens, gives back their images and files, adds to the
-- prompts' statistics, and moves the run's iteration, policy version and coordinator state forward. One change, or none.
-- It makes room in the end, and so runs on a full server, too.
-- KEYS: run. ARGV: iteration, policy version, request digest, coordinator state, seconds to keep the files of consumed
--   trajectories, number of groups, group ids, then per prompt: id, trajectories, correct.
-- Returns {'NO_RUN'}, {'NOT_NEXT', next}, {'OTHER_CONTENTS', iteration}, {'UNKNOWN_GROUP', id},
--   {'CONSUMED_BEFORE', id} or {'OK' or 'DUPLICATE', digest, iteration, policy version, coordinator state, images that
--   no group names}.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
-- A CreateGroups call delayed in the network by this many iterations would bring a consumed group back.
local ITERATIONS_REMEMBERED = 8
local iteration, policy_version, digest, state, groups = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[6])
local FIRST_GROUP = 7
local files_until_s = tonumber(redis.call('TIME')[1]) + tonumber(ARGV[5])

local function reply(word)
  local run = redis.call('HMGET', KEYS[1], 'config_digest', 'iteration', 'policy_version', 'coordinator_state')
  return {word, run[1], run[2], run[3], run[4], redis.call('ZCARD', prefix .. 'unreferenced')}
end

local held = redis.call('HMGET', KEYS[1], 'iteration', 'commit_digest')
if held[1] == iteration then
  if held[2] ~= digest then
    return {'OTHER_CONTENTS', held[1]}
  end
  -- Writing the same value again gives WAITAOF something to wait for when this call is a retry.
  redis.call('HSET', KEYS[1], 'commit_digest', digest)
  return reply('DUPLICATE')
elseif tonumber(held[1]) + 1 ~= tonumber(iteration) then
  return {'NOT_NEXT', string.format('%d', held[1] + 1)}
end
for i = FIRST_GROUP, FIRST_GROUP - 1 + groups do
  if redis.call('EXISTS', prefix .. 'group:' .. ARGV[i]) == 0 then
    if redis.call('ZSCORE', prefix .. 'consumed', ARGV[i]) then
      return {'CONSUMED_BEFORE', ARGV[i]}
    end
    return {'UNKNOWN_GROUP', ARGV[i]}
  end
end

for i = FIRST_GROUP, FIRST_GROUP - 1 + groups do
  local group = prefix .. 'group:' .. ARGV[i]
  for _, id in ipairs(cjson.decode(redis.call('HGET', group, 'trajectories'))) do
    for file in string.gmatch(redis.call('HGET', prefix .. 'trajectory:' .. id, 'files') or '', '([^,:]+):') do
      redis.call('HSET', prefix .. 'files', file, 'retired')
      redis.call('ZADD', prefix .. 'unreferenced_files', files_until_s, file)
    end
    redis.call('ZREM', prefix .. 'unmoved', id)
    redis.call('UNLINK', prefix .. 'trajectory:' .. id, prefix .. 'tokens:' .. id, prefix .. 'logprobs:' .. id,
      prefix .. 'experts:' .. id)
  end
  for digest in string.gmatch(redis.call('HGET', group, 'images') or '', '%x+') do
    if redis.call('HINCRBY', prefix .. 'references', digest, -1) == 0 then
      redis.call('HDEL', prefix .. 'references', digest)
      -- The sweep that follows deletes it, unless it was put for a group that is not there yet.
      redis.call('ZADD', prefix .. 'unreferenced', 'NX', 0, digest)
    end
  end
  redis.call('UNLINK', group)
  redis.call('ZREM', prefix .. 'groups', ARGV[i])
  redis.call('ZADD', prefix .. 'consumed', iteration, ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', prefix .. 'consumed', '-inf', tonumber(iteration) - ITERATIONS_REMEMBERED)

for i = FIRST_GROUP + groups, #ARGV, 3 do
  local before = redis.call('HGET', prefix .. 'statistics', ARGV[i]) or '0 0'
  local trajectories, correct = string.match(before, '(%d+) (%d+)')
  redis.call('HSET', prefix .. 'statistics', ARGV[i],
    string.format('%.0f %.0f', tonumber(trajectories) + tonumber(ARGV[i + 1]), tonumber(correct) + tonumber(ARGV[i + 2])))
  redis.call('ZADD', prefix .. 'prompts', 0, ARGV[i])
end
redis.call('HSET', KEYS[1], 'iteration', iteration, 'policy_version', policy_version, 'commit_digest', digest,
  'coordinator_state', state)
return reply('OK')
