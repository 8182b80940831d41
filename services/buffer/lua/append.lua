#!lua
-- Appends chunks, each fenced by its lease's epoch and its token offset.
-- KEYS: run. ARGV: tokens in Redis from which on they are to be moved to a file when a segment ends, '0' for never; then
--   per chunk: trajectory id, epoch, offset, packed tokens, packed logprobs, versions, end reason, packed expert choices.
-- Versions are 'version:stop,...': the policy version of the tokens up to the response offset `stop`.
-- Returns {'NO_RUN'} or {'OK', outcomes}, one digit of AppendOutcome per chunk.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'NO_RUN'}
end
local prefix = string.sub(KEYS[1], 1, -4)
local APPENDED, DUPLICATE, FENCED, GAP, CONFLICT, UNKNOWN = 1, 2, 3, 4, 5, 6
local OPEN = '0'
local MOVED_TOKENS = tonumber(ARGV[1])

-- The versions of tokens [first, last), neighbours of one version merged.
local function clip(versions, first, last)
  local pieces, previous = {}, nil
  for version, stop in string.gmatch(versions, '(%d+):(%d+)') do
    local upto = math.min(tonumber(stop), last)
    if upto > first then
      if version == previous then
        pieces[#pieces] = nil
      end
      pieces[#pieces + 1] = version .. ':' .. string.format('%d', upto)
      previous = version
      if upto == last then
        break
      end
    end
  end
  return table.concat(pieces, ',')
end

-- Whether the chunk's first `common` tokens differ from the ones held. Those before `moved`, in files, are not read
-- again: the epoch says that the chunk is of the lease that has written them.
local function differs(id, held_versions, moved, offset, common, tokens, logprobs, versions)
  local skipped = math.max(moved - offset, 0)
  local from, to = (offset + skipped - moved) * 4, (offset + common - moved) * 4 - 1
  if skipped < common
    and (redis.call('GETRANGE', prefix .. 'tokens:' .. id, from, to) ~= string.sub(tokens, skipped * 4 + 1, common * 4)
      or redis.call('GETRANGE', prefix .. 'logprobs:' .. id, from, to)
        ~= string.sub(logprobs, skipped * 4 + 1, common * 4)) then
    return true
  end
  return clip(held_versions, offset, offset + common) ~= clip(versions, offset, offset + common)
end

-- Keeps the expert choices of all tokens or of none: those after tokens without any, or of another size, are left out,
-- and a chunk without any drops those that are there.
local function append_experts(id, key, held_tokens, held_bytes, common, tokens, experts)
  local bytes = #experts * 4 / #tokens
  if bytes > 0 and (held_tokens == 0 or bytes == held_bytes) then
    redis.call('APPEND', prefix .. 'experts:' .. id, string.sub(experts, common * bytes + 1))
    redis.call('HSET', key, 'expert_bytes', string.format('%d', bytes))
  elseif held_bytes > 0 then
    redis.call('UNLINK', prefix .. 'experts:' .. id)
    redis.call('HDEL', key, 'expert_bytes')
  end
end

local function append(id, epoch, offset, tokens, logprobs, versions, ending, experts)
  local key = prefix .. 'trajectory:' .. id
  local held = redis.call('HMGET', key, 'epoch', 'tokens', 'end', 'versions', 'expert_bytes', 'files')
  if not held[1] then
    return UNKNOWN
  elseif held[1] ~= epoch then
    return FENCED
  end
  local held_tokens, stop = tonumber(held[2]), offset + #tokens / 4
  local moved = tonumber(string.match(held[6] or '', ':(%d+)$') or 0)
  local common = math.min(stop, held_tokens) - offset
  if common < 0 then
    return GAP
  elseif common > 0 and differs(id, held[4], moved, offset, common, tokens, logprobs, versions) then
    return CONFLICT
  end
  local ends_here = stop == held_tokens and ending ~= OPEN
  if stop > held_tokens or (ends_here and held[3] == OPEN) then
    if held[3] ~= OPEN then
      return CONFLICT
    end
    if stop > held_tokens then
      redis.call('APPEND', prefix .. 'tokens:' .. id, string.sub(tokens, common * 4 + 1))
      redis.call('APPEND', prefix .. 'logprobs:' .. id, string.sub(logprobs, common * 4 + 1))
      append_experts(id, key, held_tokens, tonumber(held[5] or 0), common, tokens, experts)
    end
    local added = clip(versions, held_tokens, stop)
    redis.call('HSET', key, 'tokens', string.format('%d', stop), 'end', ending,
      'versions', clip(held[4] .. ',' .. added, 0, stop))
    if ending ~= OPEN and MOVED_TOKENS > 0 and stop - moved >= MOVED_TOKENS then
      redis.call('ZADD', prefix .. 'unmoved', 'NX', 0, id)
    end
    return APPENDED
  elseif ending == OPEN or (ends_here and ending == held[3]) then
    -- Writing the same value again gives WAITAOF something to wait for when this call is a retry.
    redis.call('HSET', key, 'epoch', epoch)
    return DUPLICATE
  end
  return CONFLICT
end

local outcomes = {}
for i = 2, #ARGV, 8 do
  outcomes[#outcomes + 1] = append(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 4],
    ARGV[i + 5], ARGV[i + 6], ARGV[i + 7])
end
return {'OK', table.concat(outcomes)}
