-- What "fixed" and "gcra" know of a level: some doubles for each measure.
--
-- They are in sections, each with a byte that says of how many measures, their names, and their numbers. The first
-- section has the measures of the plan that came last, so the next request of that plan finds them in one piece. Each
-- measure that only other plans have is a section of its own behind it, until it is of no use.

-- The algorithm says how many numbers a measure has, and how many of its lengths after which moment it is of no use.
local NUMBERS, USE, MOMENT

-- The measures in sections: by name their numbers, as they are written.
local function measures_in(value)
  local found, at, size = {}, 1, 8 * NUMBERS
  while at <= #value do
    local count = string.byte(value, at)
    local numbers = at + 1 + 10 * count
    for i = 0, count - 1 do
      local name = string.sub(value, at + 1 + 10 * i, at + 10 + 10 * i)
      found[name] = string.sub(value, numbers + size * i, numbers + size * (i + 1) - 1)
    end
    at = numbers + size * count
  end
  return found
end

-- Sections of measures, those of a level's windows in front.
local function sections_of(level, found)
  local all = ARGV[3 + level]
  local text, planned = { all }, {}
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    local name = name_of(level, w)
    text[#text + 1], planned[name] = found[name] or string.rep('\0', 8 * NUMBERS), true
  end
  for name, numbers in pairs(found) do
    local long = tonumber(string.sub(name, 2)) * 1000000
    local moment = struct.unpack('<d', numbers, 8 * MOMENT - 7)
    -- (The calendar month has no length.)
    if not planned[name] and moment + USE * (long > 0 and long or 31 * 86400000000) > now then
      text[#text + 1] = '\1' .. name .. numbers
    end
  end
  return table.concat(text)
end

-- By level: the sections behind the first.
local others = {}

-- The numbers of a level's windows.
local function read(level)
  local all, count = ARGV[3 + level], NUMBERS * (plan[last + 5 * level + 4] - plan[last + 5 * level + 3] + 1)
  local found = redis.call('HMGET', KEYS[level], 'm', 'w')
  marks[level] = found[1] and { struct.unpack('<ddd', found[1]) } or { 0, 0, -1 }
  local value = found[2] or ''
  if string.sub(value, 1, #all) ~= all then
    value = sections_of(level, measures_in(value))
  end
  others[level] = string.sub(value, #all + 8 * count + 1)
  return { struct.unpack('<' .. string.rep('d', count), value, #all + 1) }
end

-- The field "w" for so many numbers of a level's windows.
local function written(level, numbers, count)
  return ARGV[3 + level] .. struct.pack('<' .. string.rep('d', count), unpack(numbers, 1, count)) .. others[level]
end

-- By level while leases lapse: its measures.
local changing = {}

-- Change the numbers of a measure, where there is one: `change` gets what they are and returns what they become.
local function change(level, name, change_numbers)
  if not changing[level] then
    changing[level] = measures_in(redis.call('HGET', KEYS[level], 'w') or '')
  end
  local numbers, format = changing[level][name], '<' .. string.rep('d', NUMBERS)
  if numbers then
    changing[level][name] = struct.pack(format, change_numbers(struct.unpack(format, numbers)))
  end
end

local function write_lapsed(level)
  if changing[level] and next(changing[level]) then
    redis.call('HSET', KEYS[level], 'w', sections_of(level, changing[level]))
  end
  changing[level] = nil
end
