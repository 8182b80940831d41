#!lua flags=no-writes
-- Reads ranges of tokens, end to end.
-- KEYS: run. ARGV: '1' with logprobs or '0' without, then per range, which is not empty: trajectory id, first token,
--   the one after the last, bytes of a token's expert choices or '0' without these.
-- Returns {'OK', packed tokens, packed logprobs, packed expert choices}; shorter than asked for when some were
--   consumed or moved to a file meanwhile.
local prefix = string.sub(KEYS[1], 1, -4)
local tokens, logprobs, experts = {}, {}, {}
for i = 2, #ARGV, 4 do
  local id, expert_bytes = ARGV[i], tonumber(ARGV[i + 3])
  local files = redis.call('HGET', prefix .. 'trajectory:' .. id, 'files')
  local moved = tonumber(string.match(files or '', ':(%d+)$') or 0)
  local first, stop = ARGV[i + 1] - moved, ARGV[i + 2] - moved
  if first >= 0 then
    tokens[#tokens + 1] = redis.call('GETRANGE', prefix .. 'tokens:' .. id, first * 4, stop * 4 - 1)
    if ARGV[1] == '1' then
      logprobs[#logprobs + 1] = redis.call('GETRANGE', prefix .. 'logprobs:' .. id, first * 4, stop * 4 - 1)
    end
    if expert_bytes > 0 then
      experts[#experts + 1] =
        redis.call('GETRANGE', prefix .. 'experts:' .. id, first * expert_bytes, stop * expert_bytes - 1)
    end
  end
end
return {'OK', table.concat(tokens), table.concat(logprobs), table.concat(experts)}
