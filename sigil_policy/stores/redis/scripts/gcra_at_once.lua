-- The admission that is asked most, decided and written at once: by "gcra", one level, of its windows something is known
-- by the same plan or nothing at all, and no lease may have lapsed.
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
local value = found[2] or all .. string.rep('\0', 24 * windows)

if (lapse == 0 or lapse > now) and string.sub(value, 1, #all) == all then
  local format = '<' .. string.rep('ddd', windows)
  local numbers = { struct.unpack(format, value, #all + 1) }
  local cost, reserving = asked[1], asked[2] == 1
  local admitted, rows, note = 1, { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, nil

  for w = 1, windows do
    local limit, long, i = plan[3 * w + 1], plan[3 * w + 2], 3 * w
    local amount, moment = numbers[i - 2], numbers[i - 1]
    if moment < now then
      amount, moment = amount - (now - moment) * limit / long, now
      if amount < 0 then
        amount = 0
      end
    end
    numbers[i - 2], numbers[i - 1] = amount, moment
    local left = limit - amount + 0.000001 + limit / long
    rows[w] = left
    if w <= requests then
      if left < cost and cost > 0 and left < limit then
        admitted = 0
      end
    elseif reserving and (left < 1 or left < asked[2 + w - requests]) then
      admitted = 0
    end
  end

  if admitted == 1 then
    local at, lease = last + 5, nil
    note = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
    for w = 1, reserving and windows or requests do
      local i, limit, amount, into, size = 3 * w, plan[3 * w + 1], cost, note, 4 * (w - 1)
      if w <= requests then
        if amount > limit then
          amount = limit
        end
      else
        amount = asked[2 + w - requests]
        lease = lease or { now + plan[at + 1] * (1 + plan[at + 2]), plan[at + 1], plan[at + 2] }
        into, size = lease, #lease + 5
        lease[size - 4], lease[size - 3] = string.sub(all, 10 * w - 8, 10 * w + 1), limit
        lease[size - 2], lease[size - 1], lease[size] = plan[3 * w + 2], amount, 4
      end
      local level = numbers[i - 2] + amount
      numbers[i - 2], rows[w] = level, limit - level + (0.000001 + limit / plan[3 * w + 2])
      into[size + 1], into[size + 2], into[size + 3], into[size + 4] = numbers[i - 1], level, numbers[i], amount
    end

    if lease or cost > 0 then
      local refresh = ends < now + plan[at]
      if refresh then
        ends = now + math.floor(plan[at] * 1.25) + 1000000
      end
      value = all .. struct.pack(format, unpack(numbers, 1, 3 * windows)) .. string.sub(value, #all + 24 * windows + 1)
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
  end

  for w = 1, windows do
    local limit, left = plan[3 * w + 1], rows[w]
    local free, wait = limit - numbers[3 * w - 2], nil
    if admitted == 0 and w <= requests and cost > 0 and left < cost and left < limit then
      wait = math.min(cost, limit) - free
    elseif admitted == 0 and w > requests and reserving and left < asked[2 + w - requests] then
      wait = math.max(asked[2 + w - requests], 1) - free
    elseif left < 1 then
      wait = 1 - free
    else
      wait = math.max(numbers[3 * w - 2], free)
    end
    left = math.floor(left)
    rows[w], rows[windows + w] = left > 0 and left or 0, now + math.ceil(wait * plan[3 * w + 2] / limit)
  end
  local reply = struct.pack('<i8i8' .. string.rep('i8', 2 * windows), admitted, now, unpack(rows, 1, 2 * windows))
  return note and reply .. struct.pack('<' .. string.rep('d', 4 * requests), unpack(note, 1, 4 * requests)) or reply
end
