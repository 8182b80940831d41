#!lua
-- Leases trajectories to a worker: raises the epoch of each and opens a new segment.
-- KEYS: run. ARGV: worker id, then trajectory ids.
-- Returns {'OK', 'epoch:tokens,epoch:tokens,...'}, {'NO_RUN'}, {'UNKNOWN', id} or {'FINISHED', id}; a refusal changes nothing.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local BUDGET = '4'

for i = 2, #ARGV do
  local ending = redis.call('HGET', prefix .. 'trajectory:' .. ARGV[i], 'end')
  if not ending then
    return {'UNKNOWN', ARGV[i]}
  elseif ending ~= '0' and ending ~= BUDGET then
    return {'FINISHED', ARGV[i]}
  end
end

local leases = {}
for i = 2, #ARGV do
  local key = prefix .. 'trajectory:' .. ARGV[i]
  redis.call('HINCRBY', key, 'epoch', 1)
  redis.call('HSET', key, 'worker', ARGV[1], 'end', 0)
  local held = redis.call('HMGET', key, 'epoch', 'tokens')
  leases[#leases + 1] = held[1] .. ':' .. held[2]
end
return {'OK', table.concat(leases, ',')}
