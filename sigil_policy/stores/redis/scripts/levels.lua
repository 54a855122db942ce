-- What is known of the levels of a plan, and what an algorithm does for it.
--
-- An algorithm gives:
--   STRIDE                             how many keys a level has, its hash first
--   load(level)                        read what is known of the level: fills `left` and `marks`
--   write(level)                       the value of its field "w" that says what is known now
--   take(w, amount)                    charge the present window
--   pour(w, amount)                    the same for what has happened already, within the bounds of a number
--   part(w, amount, into)              put down what a refund of what was just taken must know
--   give(w, amount, parts)             take back so much of what these parts charged: only where it is still charged
--   lapsed(level, name, limit, length, parts)   the same for all of a lapsed lease, of whatever plan
--   write_lapsed(level)                write what that has changed
--   reset(w, need, admitted)           when the window is renewed, or when it would have let `need` pass
--   NOTE                               whether a refund of requests needs their part too; else `charged_at(w, amount,
--                                      at)` makes it
--   WIDTH                              how many numbers a part has

-- (What was unpacked has the place of a next value behind it.)
local levels = (#plan - last - 5) / 5
-- What is left in each window: below 0 where it is overdrawn.
local left = { 0, 0, 0, 0, 0, 0, 0, 0 }
-- By level: what its field "m" says.
local marks = {}
-- Whether what the reply says of a window of requests may be later than it must be.
local rough = false

-- The name of the measure of a window.
local function name_of(level, w)
  local at = 10 * (w - plan[last + 5 * level + 3])
  return string.sub(ARGV[3 + level], at + 2, at + 11)
end
