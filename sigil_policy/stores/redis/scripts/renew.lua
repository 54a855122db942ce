-- A sign of life for leases: each lapses a period from now, if it has not been ended.
--
-- KEYS     the hash of each level
-- ARGV     the fields of the leases
-- reply    how many were found
-- Complexity: one read and one write for each.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local found = 0

for level = 1, #KEYS do
  local values, sets, longest = redis.call('HMGET', KEYS[level], 'm', unpack(ARGV)), {}, 0
  for i = 1, #ARGV do
    if values[i + 1] then
      local lease = cmsgpack.unpack(values[i + 1])
      lease[1] = now + lease[2] * (1 + lease[3])
      longest = math.max(longest, lease[2])
      sets[#sets + 1], sets[#sets + 2] = ARGV[i], cmsgpack.pack(lease)
      found = found + 1
    end
  end
  if #sets > 0 then
    local ends, lapse, round = struct.unpack('<ddd', values[1])
    if ends < now + 3 * longest then
      ends = now + 4 * longest
      sets[#sets + 1], sets[#sets + 2] = 'm', struct.pack('<ddd', ends, lapse, round)
      redis.call('PEXPIRE', KEYS[level], math.ceil((ends - now) / 1000))
    end
    redis.call('HSET', KEYS[level], unpack(sets))
  end
end
return found
