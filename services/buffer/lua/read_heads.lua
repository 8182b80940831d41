#!lua flags=no-writes
-- Reads what is known of trajectories before their tokens, and the prompts of their groups, each prompt once.
-- KEYS: run. ARGV: trajectory ids.
-- Returns {'NO_RUN'}, {'UNKNOWN', id} or {'OK', JSON, packed prompts end to end}, JSON:
--   [[[prompt index, tokens, epoch, end reason, versions, bytes of a token's expert choices, files or ''], ...],
--    [bytes of each prompt, ...], [digests of each prompt's images with a blank between, ...]]
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local heads, prompts, sizes, images, index_of = {}, {}, {}, {}, {}
for i = 1, #ARGV do
  local held = redis.call('HMGET', prefix .. 'trajectory:' .. ARGV[i], 'group', 'tokens', 'epoch', 'end', 'versions',
    'expert_bytes', 'files')
  local group_id = held[1]
  if not group_id then
    return {'UNKNOWN', ARGV[i]}
  end
  if not index_of[group_id] then
    local group = redis.call('HMGET', prefix .. 'group:' .. group_id, 'prompt', 'images')
    prompts[#prompts + 1] = group[1]
    sizes[#sizes + 1] = #group[1]
    images[#images + 1] = group[2] or ''
    index_of[group_id] = #prompts - 1
  end
  heads[i] = {index_of[group_id], held[2], held[3], held[4], held[5], held[6] or '0', held[7] or ''}
end
return {'OK', cjson.encode({heads, sizes, images}), table.concat(prompts)}
