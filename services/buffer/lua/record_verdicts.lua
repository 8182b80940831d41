#!lua
-- Records the verdicts of finished trajectories; the first one recorded stands.
-- KEYS: run. ARGV, per trajectory: id, verdict, reward ('' when there is none).
-- Returns {'OK', verdicts recorded}, {'NO_RUN'}, {'UNKNOWN', id} or {'UNFINISHED', id}; a refusal changes nothing.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local BUDGET = '4'

for i = 1, #ARGV, 3 do
  local ending = redis.call('HGET', prefix .. 'trajectory:' .. ARGV[i], 'end')
  if not ending then
    return {'UNKNOWN', ARGV[i]}
  elseif ending == '0' or ending == BUDGET then
    return {'UNFINISHED', ARGV[i]}
  end
end

local recorded = 0
for i = 1, #ARGV, 3 do
  local key = prefix .. 'trajectory:' .. ARGV[i]
  if redis.call('HSETNX', key, 'verdict', ARGV[i + 1]) == 1 then
    redis.call('HSET', key, 'reward', ARGV[i + 2])
    recorded = recorded + 1
  else
    -- Writing the same value again gives WAITAOF something to wait for when this call is a retry.
    redis.call('HSET', key, 'verdict', redis.call('HGET', key, 'verdict'))
  end
end
return {'OK', recorded}
