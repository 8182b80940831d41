#!lua
-- Creates the run, or reads the one that exists.
-- KEYS: run. ARGV: configuration digest, policy version, coordinator state.
-- Returns {created (1 or 0), digest, iteration, policy version, coordinator state}.
local created = 1 - redis.call('EXISTS', KEYS[1])
if created == 1 then
  redis.call('HSET', KEYS[1], 'config_digest', ARGV[1], 'iteration', 0, 'policy_version', ARGV[2],
    'coordinator_state', ARGV[3], 'groups_made', 0, 'commit_digest', '')
else
  -- Writing the same value again gives WAITAOF something to wait for when this call is a retry.
  redis.call('HSET', KEYS[1], 'config_digest', redis.call('HGET', KEYS[1], 'config_digest'))
end
local run = redis.call('HMGET', KEYS[1], 'config_digest', 'iteration', 'policy_version', 'coordinator_state')
return {created, run[1], run[2], run[3], run[4]}
