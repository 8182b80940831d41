#!lua flags=no-writes
-- Reads the run's state.
-- KEYS: run.
-- Returns {'NO_RUN'} or {'OK', digest, iteration, policy version, coordinator state}.
local run = redis.call('HMGET', KEYS[1], 'config_digest', 'iteration', 'policy_version', 'coordinator_state')
if not run[1] then
  return {'NO_RUN'}
end
return {'OK', run[1], run[2], run[3], run[4]}
