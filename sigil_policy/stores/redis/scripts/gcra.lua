-- Buckets that drain evenly: the generic cell rate algorithm with a burst of `limit`, kept as the level of a bucket.
-- Promise: at most `limit` at once, and at most `limit * (1 + t / length)` in any interval of `t`.
--
-- The numbers of a measure are the level, its moment, and the sum of all refunds. A part of a lease is its moment, the
-- level that it reached, the sum of refunds then, and its amount.
-- Complexity: the same for every request.

local STRIDE, WIDTH, NOTE = 1, 4, true
-- A bucket that is in debt drains two windows.
NUMBERS, USE, MOMENT = 3, 2, 2
-- Of a lease that is extended without end the oldest parts are forgotten: by then they have drained, or were used.
local PARTS = 64

local level_of, since, refunds = { 0, 0, 0, 0, 0, 0, 0, 0 }, { 0, 0, 0, 0, 0, 0, 0, 0 }, { 0, 0, 0, 0, 0, 0, 0, 0 }

-- What the rounding of a level and of a moment may add.
local function slack(limit, long)
  return 0.000001 + limit / long
end

local function put(w, amount)
  level_of[w] = amount
  left[w] = plan[3 * w + 1] - amount + slack(plan[3 * w + 1], plan[3 * w + 2])
end

local function load(level)
  local numbers = read(level)
  local at = last + 5 * level
  local first = plan[at + 3]
  for w = first, plan[at + 4] do
    local limit, long, i = plan[3 * w + 1], plan[3 * w + 2], 3 * (w - first) + 1
    local amount, moment = numbers[i], numbers[i + 1]
    -- While a clock that was set back catches up, nothing drains.
    if moment < now then
      amount, moment = amount - (now - moment) * limit / long, now
      if amount < 0 then
        amount = 0
      end
    end
    since[w], refunds[w], level_of[w] = moment, numbers[i + 2], amount
    left[w] = limit - amount + 0.000001 + limit / long
  end
end

local function write(level)
  local numbers, count = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 0
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    numbers[count + 1], numbers[count + 2], numbers[count + 3] = level_of[w], since[w], refunds[w]
    count = count + 3
  end
  return written(level, numbers, count)
end

local function take(w, amount)
  put(w, level_of[w] + amount)
end

local function pour(w, amount)
  -- A report that is absurd must not lock the caller out for ever: the debt is two windows at most.
  put(w, math.max(level_of[w], math.min(level_of[w] + amount, 2 * plan[3 * w + 1])))
end

local function part(w, amount, into)
  if #into >= WIDTH * PARTS then
    for i = 1, #into do
      into[i] = into[i + WIDTH]
    end
  end
  local at = #into
  into[at + 1], into[at + 2], into[at + 3], into[at + 4] = since[w], level_of[w], refunds[w], amount
end

-- How much of `amount` comes back of parts, at a moment, with what drains in a microsecond and all refunds so far.
local function unused(amount, parts, moment, rate, sum)
  local max, min = math.max, math.min
  -- The newest part was taken for what came last: it is the first that was not needed.
  local shares, back = {}, 0
  for at = #parts, WIDTH, -WIDTH do
    shares[at] = min(amount, parts[at])
    amount = amount - shares[at]
  end
  for at = WIDTH, #parts, WIDTH do
    -- Only what has not drained yet comes back. Of a part and those before it that is what still stands under the
    -- level it reached, which drains, and sinks with each refund that others had since.
    local drained = (moment - parts[at - 3]) * rate + max(sum - parts[at - 1], 0)
    back = max(min(back + shares[at], parts[at - 2] - drained), 0)
  end
  return back
end

local function give(w, amount, parts)
  local back = unused(amount, parts, since[w], plan[3 * w + 1] / plan[3 * w + 2], refunds[w])
  back = math.min(back, level_of[w])
  refunds[w] = refunds[w] + back
  put(w, level_of[w] - back)
end

local function lapsed(level, name, limit, long, parts)
  change(level, name, function(amount, moment, sum)
    local rate = limit / long
    amount, moment = math.max(amount - math.max(now - moment, 0) * rate, 0), math.max(now, moment)
    local back = math.min(unused(MOST, parts, moment, rate, sum), amount)
    return amount - back, moment, sum + back
  end)
end

local function reset(w, need, admitted)
  local amount, limit = level_of[w], plan[3 * w + 1]
  local free, wait = limit - amount, nil
  if need and not admitted and left[w] < need then
    wait = need - free
  elseif left[w] < 1 then
    wait = 1 - free
  else
    -- No sooner than the window's own rate allows what remains: a full quota must not invite a burst every second.
    wait = math.max(amount, free)
  end
  return now + math.ceil(wait * plan[3 * w + 2] / limit)
end
