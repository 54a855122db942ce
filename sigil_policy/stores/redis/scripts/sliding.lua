-- Exact sliding windows: what was spent is kept with its moment. Promise: never more than `limit` in any interval of
-- `length`, wherever it begins.
--
-- The log of a level is a string of entries of 16 bytes, the oldest first: moment, amount, and whose it is (0 is all
-- windows of requests; each measure has a number of its own, too). Entries are numbered from the first one ever
-- and cut off in front when no window needs them and they are most of the log. The field "w" holds the number of the
-- first entry there and of the next one to come, the newest moment, the last number given to a measure, and for each
-- measure its name, number, length, the first entry that has not left its window, what is spent in it, the moment of
-- that entry, and the moment of its own newest one. A part of a lease is the number of an entry, its moment, its amount.
--
-- Complexity: a window moves over each entry once: the same for every request but one that comes after many have ended
-- together, which reads these. What it says of a window that is used up reads the entries that must leave it, WALK of the
-- log at most; where that is not enough, it says when the newest has left.

local STRIDE, WIDTH, NOTE = 2, 3, true
-- Of a lease that is extended without end the oldest parts are forgotten: they were used first.
local PARTS = 64
local SIZE, ENTRY = 16, 'I7I7I2'
-- So few entries are read at once that they fit on Lua's stack.
local CHUNK = 256
-- So many entries are read to say when a window is renewed.
local WALK = 512
-- The log is cut when so many entries are of no use.
local CUT = 256

-- By level: its log, and its measures by name. By window its measure, and the entry that it last took.
local logs, measures, measure_of, taken = {}, {}, {}, {}

local function hash(level)
  return KEYS[2 * level - 1]
end

local function entries(level, number, count)
  local at = (number - logs[level].base) * SIZE
  local text = redis.call('GETRANGE', KEYS[2 * level], at, at + count * SIZE - 1)
  local found = { struct.unpack('<' .. string.rep(ENTRY, #text / SIZE), text) }
  -- Behind the values comes the place where the next one would be.
  found[#found] = nil
  return found
end

-- A log that the server evicted is an empty one.
local function lost(level, measure)
  measure.next, measure.sum, measure.first = logs[level].stop, 0, 0
end

-- Whether an entry is a measure's.
local function counts(measure, code)
  return code == measure.code or (code == 0 and measure.shared)
end

-- Let go of what has left a window.
local function advance(level, measure)
  local log, cutoff, count = logs[level], now - measure.length, 8
  if measure.next < log.base then
    lost(level, measure)
  end
  if log.newest <= cutoff then
    lost(level, measure)
  end
  while measure.next < log.stop and measure.first <= cutoff do
    local found = entries(level, measure.next, count)
    local at = 1
    while found[at] and found[at] <= cutoff do
      if counts(measure, found[at + 2]) then
        measure.sum = measure.sum - found[at + 1]
      end
      measure.next, at = measure.next + 1, at + 3
    end
    if found[at] then
      measure.first = found[at]
    elseif at == 1 then
      lost(level, measure)
    end
    count = CHUNK
  end
end

-- What is spent in a window of requests that nobody had before.
local function count_all(level, measure)
  local log = logs[level]
  local number = log.base
  measure.next = number
  while number < log.stop do
    local found = entries(level, number, CHUNK)
    if not found[1] then
      return lost(level, measure)
    end
    if number == log.base then
      measure.first = found[1]
    end
    for at = 1, #found, 3 do
      if found[at + 2] == 0 then
        measure.sum, measure.last = measure.sum + found[at + 1], found[at]
      end
    end
    number = number + #found / 3
  end
end

local function load(level)
  local values = redis.call('HMGET', hash(level), 'm', 'w')
  marks[level] = values[1] and { struct.unpack('<ddd', values[1]) } or { 0, 0, -1 }
  local log, known = { base = 0, stop = 0, newest = 0, codes = 0, pending = {} }, {}
  if values[2] then
    local state = cmsgpack.unpack(values[2])
    log.base, log.stop, log.newest, log.codes = state[1], state[2], state[3], state[4]
    for at = 5, #state, 7 do
      known[state[at]] = {
        shared = string.byte(state[at]) == 114, code = state[at + 1], length = state[at + 2], next = state[at + 3], sum = state[at + 4],
        first = state[at + 5], last = state[at + 6],
      }
    end
  end
  logs[level], measures[level] = log, known
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    local name = name_of(level, w)
    local measure = known[name]
    if not measure then
      log.codes = log.codes % 65535 + 1
      measure = {
        shared = plan[3 * w] <= requests, code = log.codes, length = plan[3 * w + 2], next = log.stop, sum = 0,
        first = 0, last = 0,
      }
      if measure.shared then
        count_all(level, measure)
      end
      known[name] = measure
    end
    measure_of[w], measure.planned = measure, true
  end
  for name, measure in pairs(known) do
    if not measure.planned and measure.last <= now - measure.length then
      known[name] = nil
    else
      advance(level, measure)
      plan[last + 5 * level] = math.max(plan[last + 5 * level], measure.length)
    end
  end
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    left[w] = plan[3 * w + 1] - measure_of[w].sum
  end
end

-- Write what came, and cut off what is of no use.
local function flush(level)
  local log, key = logs[level], KEYS[2 * level]
  local pending = log.pending
  if #pending > 0 then
    local text = struct.pack('<' .. string.rep(ENTRY, #pending / 3), unpack(pending))
    local count = #pending / 3
    if log.stop - count == log.base then
      redis.call('SET', key, text, 'PX', math.ceil((marks[level][1] - now) / 1000))
    elseif redis.call('APPEND', key, text) ~= (log.stop - log.base) * SIZE then
      -- The server evicted the log: it begins anew.
      redis.call('SET', key, text, 'PX', math.ceil((marks[level][1] - now) / 1000))
      log.base = log.stop - count
      for _, measure in pairs(measures[level]) do
        measure.next, measure.sum, measure.first = log.base, 0, pending[1]
        for at = 1, #pending, 3 do
          if counts(measure, pending[at + 2]) then
            measure.sum = measure.sum + pending[at + 1]
          end
        end
      end
    end
    log.pending = {}
  end
  local first = log.stop
  for _, measure in pairs(measures[level]) do
    first = math.min(first, measure.next)
  end
  if first == log.stop and first > log.base then
    redis.call('DEL', key)
    log.base = first
  elseif first - log.base >= CUT and 2 * (first - log.base) >= log.stop - log.base then
    local rest = redis.call('GETRANGE', key, (first - log.base) * SIZE, -1)
    redis.call('SET', key, rest, 'PX', math.ceil((marks[level][1] - now) / 1000))
    log.base = first
  end
end

local function state_of(level)
  local log = logs[level]
  local state = { log.base, log.stop, log.newest, log.codes }
  for name, measure in pairs(measures[level]) do
    local at = #state
    state[at + 1], state[at + 2], state[at + 3], state[at + 4] = name, measure.code, measure.length, measure.next
    state[at + 5], state[at + 6], state[at + 7] = measure.sum, measure.first, measure.last
  end
  return cmsgpack.pack(state)
end

local function write(level)
  flush(level)
  return state_of(level)
end

local function level_of(w)
  local level = 1
  while plan[last + 5 * level + 4] < w do
    level = level + 1
  end
  return level
end

local function append(w, amount, code)
  local level = level_of(w)
  local log = logs[level]
  left[w] = left[w] - amount
  taken[w] = nil
  if amount == 0 then
    return
  end
  local pending, count = log.pending, #log.pending
  if code == 0 and pending[3] == 0 then
    -- All windows of requests share an entry.
    taken[w] = log.stop - count / 3
    return
  end
  local stamp = math.max(now, log.newest)
  pending[count + 1], pending[count + 2], pending[count + 3] = stamp, amount, code
  taken[w], log.stop, log.newest = log.stop, log.stop + 1, stamp
  for _, measure in pairs(measures[level]) do
    if measure.next == taken[w] then
      measure.first = stamp
    end
    if counts(measure, code) then
      measure.sum, measure.last = measure.sum + amount, stamp
    end
  end
end

local function take(w, amount)
  local code = measure_of[w].code
  if plan[3 * w] <= requests then
    -- Where a cost takes a window whole, and that is less than it takes of the others, each has an entry of its own.
    code = 0
    for v = plan[last + 5 * level_of(w) + 3], plan[last + 5 * level_of(w) + 4] do
      if plan[3 * v] <= requests and plan[3 * v + 1] < asked[1] then
        code = measure_of[w].code
      end
    end
  end
  append(w, amount, code)
end

local function pour(w, amount)
  append(w, amount, measure_of[w].code)
end

local function part(w, amount, into)
  if #into >= WIDTH * PARTS then
    for i = 1, #into do
      into[i] = into[i + WIDTH]
    end
  end
  local at = #into
  into[at + 1], into[at + 2], into[at + 3] = taken[w] or -1, measure_of[w].last, amount
end

-- Take `amount` back from an entry of a measure.
local function refund(level, of, number, moment, amount)
  local log = logs[level]
  if number < log.base or amount <= 0 then
    return
  end
  local found = entries(level, number, 1)
  local code = found[3]
  -- What was evicted, and cut off since, is another entry or none.
  if found[1] ~= moment or not counts(of, code) then
    return
  end
  -- An entry that windows share comes back once.
  amount = math.min(amount, found[2])
  local at = (number - log.base) * SIZE
  redis.call('SETRANGE', KEYS[2 * level], at, struct.pack('<' .. ENTRY, moment, found[2] - amount, code))
  for _, measure in pairs(measures[level]) do
    if counts(measure, code) and measure.next <= number then
      measure.sum = measure.sum - amount
    end
  end
end

local function give(w, amount, parts)
  local level = level_of(w)
  -- The newest part was taken for what came last: it is the first that was not needed.
  for at = #parts, WIDTH, -WIDTH do
    refund(level, measure_of[w], parts[at - 2], parts[at - 1], math.min(amount, parts[at]))
    amount = math.max(amount - parts[at], 0)
  end
  for v = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    left[v] = plan[3 * v + 1] - measure_of[v].sum
  end
end

local function lapsed(level, name, _, _, parts)
  local measure = measures[level][name]
  if measure then
    for at = WIDTH, #parts, WIDTH do
      refund(level, measure, parts[at - 2], parts[at - 1], parts[at])
    end
  end
end

local function write_lapsed(level)
  redis.call('HSET', hash(level), 'w', state_of(level))
end

-- When `amount` of what is spent will surely have left a window: exactly then, if that is seen in WALK entries; else, and
-- if it is more than there is, when all of it has; and whether it was not seen.
local function free(level, measure, amount)
  local log, number = logs[level], measure.next
  while number < log.stop do
    if number >= measure.next + WALK then
      return measure.last + measure.length, true
    end
    local found = entries(level, number, CHUNK)
    if not found[1] then
      break
    end
    for at = 1, #found, 3 do
      if counts(measure, found[at + 2]) then
        amount = amount - found[at + 1]
        if amount <= 0 then
          return found[at] + measure.length, false
        end
      end
    end
    number = number + #found / 3
  end
  return measure.last + measure.length, false
end

local function reset(w, need, admitted)
  local measure, missing = measure_of[w], 0
  if need and not admitted and left[w] < need then
    missing = need - left[w]
  elseif left[w] < 1 then
    missing = 1 - left[w]
  end
  if measure.last <= now - measure.length then
    return now + measure.length
  elseif missing > 0 then
    local moment, unseen = free(level_of(w), measure, missing)
    rough = rough or (unseen and plan[3 * w] <= requests)
    return moment
  elseif admitted and plan[3 * w] <= requests then
    return now + measure.length
  end
  return measure.last + measure.length
end
