#!lua flags=no-writes
-- Reads ranges of tokens, end to end.
-- KEYS: run. ARGV: '1' with logprobs or '0' without, then per range: trajectory id, first byte, last byte.
-- Returns {'OK', packed tokens, packed logprobs}; shorter than asked for when a trajectory was consumed meanwhile.
local prefix = string.sub(KEYS[1], 1, -4)
local tokens, logprobs = {}, {}
for i = 2, #ARGV, 3 do
  tokens[#tokens + 1] = redis.call('GETRANGE', prefix .. 'tokens:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if ARGV[1] == '1' then
    logprobs[#logprobs + 1] = redis.call('GETRANGE', prefix .. 'logprobs:' .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
  end
end
return {'OK', table.concat(tokens), table.concat(logprobs)}
