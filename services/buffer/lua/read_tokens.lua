#!lua flags=no-writes
-- Reads ranges of tokens, end to end.
-- KEYS: run. ARGV: '1' with logprobs or '0' without, then per range: trajectory id, first byte, last byte, bytes of a
--   token's expert choices or '0' without these.
-- Returns {'OK', packed tokens, packed logprobs, packed expert choices}; shorter than asked for when a trajectory was
--   consumed or moved to a file meanwhile.
local prefix = string.sub(KEYS[1], 1, -4)
local tokens, logprobs, experts = {}, {}, {}
for i = 2, #ARGV, 4 do
  tokens[#tokens + 1] = redis.call('GETRANGE', prefix .. 'tokens:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if ARGV[1] == '1' then
    logprobs[#logprobs + 1] = redis.call('GETRANGE', prefix .. 'logprobs:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
  end
  if ARGV[i + 3] ~= '0' then
    local first, stop = ARGV[i + 1] / 4 * ARGV[i + 3], (ARGV[i + 2] + 1) / 4 * ARGV[i + 3]
    experts[#experts + 1] = redis.call('GETRANGE', prefix .. 'experts:' .. ARGV[i], first, stop - 1)
  end
end
return {'OK', table.concat(tokens), table.concat(logprobs), table.concat(experts)}
