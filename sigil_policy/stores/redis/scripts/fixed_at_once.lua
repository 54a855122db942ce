-- The admission that is asked most, decided and written at once: by "fixed", one level, no calendar months, and of the
-- level's windows something is known by the same plan or nothing at all, and no lease may have lapsed.
--
-- It answers, and leaves behind, byte for byte what the files behind it do, which say why; a test holds both against each
-- other. It does so in less than half the time: their functions and tables are not even made. If it is another case, it
-- has changed nothing, and they decide.

local key, all = KEYS[1], ARGV[4]
local found = redis.call('HMGET', key, 'm', 'w')
local ends, lapse, page = 0, 0, -1
if found[1] then
  ends, lapse, page = struct.unpack('<ddd', found[1])
end
local value = found[2] or all .. string.rep('\0', 16 * windows)

if (lapse == 0 or lapse > now) and string.sub(value, 1, #all) == all then
  local format = '<' .. string.rep('dd', windows)
  local numbers = { struct.unpack(format, value, #all + 1) }
  local cost, reserving = asked[1], asked[2] == 1
  local admitted, rows = 1, { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

  for w = 1, windows do
    local limit, long, i = plan[3 * w + 1], plan[3 * w + 2], 2 * w
    local begun = now - now % long
    if numbers[i - 1] < begun then
      numbers[i - 1], numbers[i] = begun, 0
    end
    local left = limit - numbers[i]
    rows[w], rows[windows + w] = left, numbers[i - 1] + long
    if w <= requests then
      if left < cost and cost > 0 and left < limit then
        admitted = 0
      end
    elseif reserving and (left < 1 or left < asked[2 + w - requests]) then
      admitted = 0
    end
  end

  if admitted == 1 and (cost > 0 or (reserving and windows > requests)) then
    local at, lease = last + 5, nil
    for w = 1, reserving and windows or requests do
      local i, limit, amount = 2 * w, plan[3 * w + 1], cost
      if w <= requests then
        if amount > limit then
          amount = limit
        end
      else
        amount = asked[2 + w - requests]
        lease = lease or { now + plan[at + 1] * (1 + plan[at + 2]), plan[at + 1], plan[at + 2] }
        local size = #lease
        lease[size + 1], lease[size + 2] = string.sub(all, 10 * w - 8, 10 * w + 1), limit
        lease[size + 3], lease[size + 4], lease[size + 5] = plan[3 * w + 2], amount, 2
        lease[size + 6], lease[size + 7] = numbers[i - 1], amount
      end
      local used = numbers[i] + amount
      if used > MOST then
        used = MOST
      end
      numbers[i], rows[w] = used, limit - used
    end

    local refresh = ends < now + plan[at]
    if refresh then
      ends = now + math.floor(plan[at] * 1.25) + 1000000
    end
    value = all .. struct.pack(format, unpack(numbers, 1, 2 * windows)) .. string.sub(value, #all + 16 * windows + 1)
    if lease then
      if lapse == 0 or lease[1] < lapse then
        lapse = lease[1]
      end
      if page > lease[1] then
        page = lease[1]
      end
      redis.call('HSET', key, 'w', value, 'm', struct.pack('<ddd', ends, lapse, page), ARGV[3], cmsgpack.pack(lease))
    elseif refresh then
      redis.call('HSET', key, 'w', value, 'm', struct.pack('<ddd', ends, lapse, page))
    else
      redis.call('HSET', key, 'w', value)
    end
    if refresh then
      redis.call('PEXPIRE', key, math.ceil((ends - now) / 1000))
    end
  end

  for w = 1, windows do
    if rows[w] < 0 then
      rows[w] = 0
    end
  end
  return struct.pack('<i8i8' .. string.rep('i8', 2 * windows), admitted, now, unpack(rows, 1, 2 * windows))
end
