-- What operations on a lease share.

-- What the lease of this call holds on a level: by window the amount and its parts, and whether it has not lapsed; nil
-- if it is not there.
local function held(level)
  local value = ARGV[3] ~= '' and redis.call('HGET', KEYS[STRIDE * (level - 1) + 1], ARGV[3])
  if not value then
    return nil
  end
  local lease, amounts, parts, i = cmsgpack.unpack(value), {}, {}, 4
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    if plan[3 * w] > requests then
      local size = lease[i + 4]
      amounts[w], parts[w] = lease[i + 3], { unpack(lease, i + 5, i + 4 + size) }
      i = i + 5 + size
    end
  end
  return amounts, parts, lease[3] == plan[last + 5 * level + 2]
end

-- Forget it there.
local function forget(level)
  redis.call('HDEL', KEYS[STRIDE * (level - 1) + 1], ARGV[3])
end

-- What is left in the token windows, in the order of the plan, behind `reply`.
local function tokens_left(reply)
  for w = 1, windows do
    local place = plan[3 * w]
    if place > requests then
      reply[2 + place - requests] = math.floor(left[w])
    end
  end
  return reply
end
