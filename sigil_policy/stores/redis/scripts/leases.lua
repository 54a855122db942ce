-- Leases: tokens that a request holds until it is settled, or until nobody gives a sign of life for it.
--
-- A lease is a field of each level that has token windows, and says all that must be known to end it there, whatever
-- plan the next request has: when it lapses, its period, 1 if it only has to be forgotten then, and for each token
-- window its field, limit, length, how much is reserved, how many numbers its parts have, and these.
--
-- Promise: a lease that lapses comes back to the windows that it charged, once. For another period it stays as one that
-- holds nothing, so that a settlement which comes after all is charged what was used; one that is repeated finds no
-- lease, and changes nothing. With "charged" it stays as it is for that time, and is forgotten then.
--
-- Complexity: one comparison for a request. When the first lease may have lapsed, some hundred fields are looked at,
-- and the next requests go on from there.

local function end_lapsed(level)
  local PAGES, PAGE, INFINITY = 6, 100, 1 / 0
  local key, mark = KEYS[STRIDE * (level - 1) + 1], marks[level]
  local cursor, nearest = '0', INFINITY
  if mark[3] >= 0 then
    cursor, nearest = redis.call('HGET', key, 'c') or '0', mark[3]
  end
  local due = {}
  for _ = 1, PAGES do
    local page = redis.call('HSCAN', key, cursor, 'COUNT', PAGE)
    local found = page[2]
    cursor = page[1]
    for at = 1, #found, 2 do
      local field = found[at]
      if string.byte(field) == 61 then
        local lease = cmsgpack.unpack(found[at + 1])
        if lease[1] <= now then
          lease.field = field
          due[#due + 1] = lease
        else
          nearest = math.min(nearest, lease[1])
        end
      end
    end
    if cursor == '0' then
      break
    end
  end
  -- The oldest charges first: by "gcra" a refund is less where others that came later had theirs before.
  table.sort(due, function(a, b)
    local one, other = a[9] or 0, b[9] or 0
    return one < other or (one == other and (a[10] or 0) < (b[10] or 0))
  end)
  for _, lease in ipairs(due) do
    local expiry, rest, i = lease[1], { 0, lease[2], 1 }, 4
    if lease[3] == 0 then
      -- First it gives back what it holds, then it stays for its settlement.
      expiry = expiry + lease[2]
      rest[1] = expiry
      while i <= #lease do
        local size, n = lease[i + 4], #rest
        lapsed(level, lease[i], lease[i + 1], lease[i + 2], { unpack(lease, i + 5, i + 4 + size) })
        rest[n + 1], rest[n + 2], rest[n + 3], rest[n + 4], rest[n + 5] = lease[i], lease[i + 1], lease[i + 2], 0, 0
        i = i + 5 + size
      end
    end
    if expiry <= now then
      redis.call('HDEL', key, lease.field)
    else
      redis.call('HSET', key, lease.field, cmsgpack.pack(rest))
      nearest = math.min(nearest, expiry)
    end
  end
  write_lapsed(level)
  if cursor == '0' then
    redis.call('HDEL', key, 'c')
    redis.call('HSET', key, 'm', struct.pack('<ddd', mark[1], nearest < INFINITY and nearest or 0, -1))
  else
    nearest = nearest < INFINITY and nearest or now + plan[last + 5 * level + 1]
    redis.call('HSET', key, 'm', struct.pack('<ddd', mark[1], mark[2], nearest), 'c', cursor)
  end
end

-- Read a level, without the leases that have lapsed.
local function open(level)
  load(level)
  local first = marks[level][2]
  if first > 0 and first <= now then
    end_lapsed(level)
    load(level)
  end
end

-- Write a level, and its lease if there is one.
local function save(level, lease)
  local key, mark = KEYS[STRIDE * (level - 1) + 1], marks[level]
  local lasting = plan[last + 5 * level]
  local refresh = mark[1] < now + lasting
  local changed = refresh
  local sets, at = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 0
  if refresh then
    -- Somewhat longer than it must, so that most requests need not say it.
    mark[1] = now + math.floor(lasting * 1.25) + 1000000
  end
  if lease then
    local expiry = lease[1]
    sets[1], sets[2], at = ARGV[3], cmsgpack.pack(lease), 2
    if mark[2] == 0 or expiry < mark[2] then
      mark[2], changed = expiry, true
    end
    if mark[3] > expiry then
      mark[3], changed = expiry, true
    end
  end
  sets[at + 1], sets[at + 2] = 'w', write(level)
  at = at + 2
  if changed then
    sets[at + 1], sets[at + 2] = 'm', struct.pack('<ddd', mark[1], mark[2], mark[3])
    at = at + 2
  end
  redis.call('HSET', key, unpack(sets, 1, at))
  if refresh then
    local rest = math.ceil((mark[1] - now) / 1000)
    for k = STRIDE * (level - 1) + 1, STRIDE * level do
      redis.call('PEXPIRE', KEYS[k], rest)
    end
  end
end

-- Add to the lease of a level (nil: a new one) what it holds of a window.
local function hold(lease, level, w, amount, parts)
  if not lease then
    local at = last + 5 * level
    local period, charged = plan[at + 1], plan[at + 2]
    lease = { now + period * (1 + charged), period, charged }
  end
  local at, size = #lease, #parts
  lease[at + 1], lease[at + 2], lease[at + 3] = name_of(level, w), plan[3 * w + 1], plan[3 * w + 2]
  lease[at + 4], lease[at + 5] = amount, size
  for i = 1, size do
    lease[at + 5 + i] = parts[i]
  end
  return lease
end
