-- Windows aligned to the epoch, or to the months of the calendar (UTC). Promise: at most `limit` in each.
--
-- The numbers of a measure are where the last counted window began, and how much of it is used. A part of a lease is the
-- window that was charged, and how much: a lease that is extended in a later window keeps nothing of the earlier one.
-- Complexity: the same for every request.

local STRIDE, WIDTH, NOTE = 1, 2, false
NUMBERS, USE, MOMENT = 2, 1, 1
local DAY = 86400000000

local start, used = { 0, 0, 0, 0, 0, 0, 0, 0 }, { 0, 0, 0, 0, 0, 0, 0, 0 }

-- The first day of the month of a day, days counted from 1970.
local function first_of_month(day)
  local floor = math.floor
  -- Years begin in March here: the day that some of them have more is their last.
  local of_era = (day + 719468) % 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
  local month = floor((5 * of_year + 2) / 153)
  return day - (of_year - floor((153 * month + 2) / 5))
end

-- Where the window that holds a moment begins.
local function begin(long, moment)
  if long > 0 then
    return moment - moment % long
  end
  return first_of_month(math.floor(moment / DAY)) * DAY
end

local function load(level)
  local numbers = read(level)
  local at = last + 5 * level
  local first = plan[at + 3]
  for w = first, plan[at + 4] do
    local long, i = plan[3 * w + 2], 2 * (w - first) + 1
    local begun, count = long > 0 and now - now % long or begin(long, now), 0
    -- Later than now is what was counted before the clock was set back: it goes on, nobody gets a fresh window.
    if numbers[i] >= begun then
      begun, count = numbers[i], numbers[i + 1]
    end
    start[w], used[w], left[w] = begun, count, plan[3 * w + 1] - count
  end
end

local function write(level)
  local numbers, count = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 0
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    numbers[count + 1], numbers[count + 2] = start[w], used[w]
    count = count + 2
  end
  return written(level, numbers, count)
end

local function take(w, amount)
  local count = used[w] + amount
  if count > MOST then
    count = MOST
  end
  used[w], left[w] = count, plan[3 * w + 1] - count
end

local pour = take

local function part(w, amount, into)
  if into[1] == start[w] then
    into[2] = into[2] + amount
  else
    into[1], into[2] = start[w], amount
  end
end

local function give(w, amount, parts)
  if parts[1] == start[w] then
    take(w, -math.min(amount, parts[2], used[w]))
  end
end

local function lapsed(level, name, _, _, parts)
  change(level, name, function(begun, count)
    return begun, begun == parts[1] and math.max(count - parts[2], 0) or count
  end)
end

local function reset(w)
  local long = plan[3 * w + 2]
  return long > 0 and start[w] + long or first_of_month(start[w] / DAY + 31) * DAY
end

-- What a request charged that came at `at`.
local function charged_at(w, amount, at)
  return { begin(plan[3 * w + 2], at), amount }
end
