-- What every decision about limits begins with: the server's time, and the plan.
--
-- A script is this file, then one algorithm (fixed.lua, gcra.lua, sliding.lua), then leases.lua, then one operation
-- (admit.lua, extend.lua, settle.lua, charge.lua, undo.lua). Each runs alone on the server: nobody sees half of it.
--
-- KEYS     for each level of the plan its hash, and by "sliding" its log behind it. In a cluster all have one hash tag,
--          that of the last level, and no other key is touched: it runs the script where they are.
-- ARGV[1]  the plan, as doubles: how many request windows, how many windows; for each window, level by level, its place
--          in the plan, its limit and its length (0 is the calendar month); then for each level how long its keys must
--          last, the period of a lease, 1 if a lapsed lease stays charged, its first and its last window
-- ARGV[2]  what is asked, as doubles: each operation says of what
-- ARGV[3]  the field of the lease, or nothing
-- ARGV[4]+ the name of each window's measure, level by level
--
-- Moments and lengths are whole microseconds and amounts are below 10^15, so doubles hold both exactly.
--
-- The hash of a level has the fields
--   m       until when its keys last, when the first lease may lapse (0: none is open), and while lapsed leases are
--           looked for page by page the first one seen so far (else -1)
--   c       where that search goes on
--   r60     what the algorithm knows of the measure "requests:60" ("w", of all of them, by "sliding")
--   =...    a lease
-- The key has a time to live from the script that makes it, so no key is ever without.
--
-- Each run makes all its functions and tables anew. So tables that fill up are made with room, and functions use the
-- globals of the server rather than locals, which every one of them would have to be tied to.

local MOST = 999999999999999

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local plan = { struct.unpack('<' .. string.rep('d', #ARGV[1] / 8), ARGV[1]) }
local asked = { struct.unpack('<' .. string.rep('d', #ARGV[2] / 8), ARGV[2]) }
for i = 1, #asked do
  -- Whatever is compared with a number that is none is false: nothing would ever be refused again.
  if asked[i] - asked[i] ~= 0 then
    return redis.error_reply('ERR what is asked is not a number')
  end
end
local requests, windows = plan[1], plan[2]
-- Window w has its place, limit and length in the plan at 3w, 3w + 1 and 3w + 2; what a level says begins at
-- last + 5 * level.
local last = 3 * windows - 2
-- (What was unpacked has the place of a next value behind it.)
local levels = (#plan - last - 5) / 5

-- What is left in each window: below 0 where it is overdrawn.
local left = { 0, 0, 0, 0, 0, 0, 0, 0 }
-- By level: what its field "m" says.
local marks = {}
-- Whether what the reply says of a window of requests may be later than it must be.
local rough = false

-- An algorithm gives:
--   STRIDE                             how many keys a level has, its hash first
--   load(level)                        read what is known of the level: fills `left` and `marks`
--   write(level, sets, at)             put the fields and values that say what is known now into `sets` behind `at`;
--                                      returns the index of the last
--   take(w, amount)                    charge the present window
--   pour(w, amount)                    the same for what has happened already, within the bounds of a number
--   part(w, amount, into)              put down what a refund of what was just taken must know
--   give(w, amount, parts)             take back so much of what these parts charged: only where it is still charged
--   lapsed(level, name, limit, length, parts)   the same for all of a lapsed lease, of whatever plan
--   reset(w, need, admitted)           when the window is renewed, or when it would have let `need` pass
--   NOTE                               whether a refund of requests needs their part too; else `charged_at(w, amount,
--                                      at)` makes it
--   WIDTH                              how many numbers a part has
