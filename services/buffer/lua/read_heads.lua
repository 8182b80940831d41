#!lua flags=no-writes
-- Reads what is known of trajectories before their tokens, and the prompts of their groups, each prompt once.
-- KEYS: run. ARGV: trajectory ids.
-- Returns {'NO_RUN'}, {'UNKNOWN', id} or {'OK', JSON, packed prompts end to end}, JSON:
--   [[[prompt index, tokens, epoch, end reason, versions, bytes of a token's expert choices], ...],
--    [bytes of each prompt, ...]]
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local heads, prompts, sizes, index_of = {}, {}, {}, {}
for i = 1, #ARGV do
  local held = redis.call('HMGET', prefix .. 'trajectory:' .. ARGV[i], 'group', 'tokens', 'epoch', 'end', 'versions',
    'expert_bytes')
  local group_id = held[1]
  if not group_id then
    return {'UNKNOWN', ARGV[i]}
  end
  if not index_of[group_id] then
    local prompt = redis.call('HGET', prefix .. 'group:' .. group_id, 'prompt')
    prompts[#prompts + 1] = prompt
    sizes[#sizes + 1] = #prompt
    index_of[group_id] = #prompts - 1
  end
  heads[i] = {index_of[group_id], held[2], held[3], held[4], held[5], held[6] or '0'}
end
return {'OK', cjson.encode({heads, sizes}), table.concat(prompts)}
