-- What every decision about limits begins with: the server's time, and what is asked.
--
-- A script is this file, then levels.lua, one algorithm (fixed.lua and gcra.lua behind measures.lua, or sliding.lua),
-- leases.lua, and one operation (admit.lua, extend.lua, settle.lua, charge.lua, undo.lua). Each runs alone on the
-- server: nobody sees half of it. The admission that is asked most has a shorter way in front: fixed_at_once.lua or
-- gcra_at_once.lua, right behind this file.
--
-- KEYS     for each level of the plan its hash, and by "sliding" its log behind it. In a cluster all have one hash tag,
--          that of the last level, and no other key is touched: it runs the script where they are.
-- ARGV[1]  the plan, as doubles: how many request windows, how many windows; for each window, level by level, its place
--          in the plan, its limit and its length (0 is the calendar month); then for each level how long its keys must
--          last, the period of a lease, 1 if a lapsed lease stays charged, its first and its last window
-- ARGV[2]  what is asked, as doubles: each operation says of what
-- ARGV[3]  the field of the lease, or nothing
-- ARGV[4]+ for each level the names of its windows' measures: a byte that says how many, and ten bytes for each
--
-- Moments and lengths are whole microseconds and amounts are below 10^15, so doubles hold both exactly.
--
-- The hash of a level has the fields
--   m       until when its keys last, when the first lease may lapse (0: none is open), and while lapsed leases are
--           looked for page by page the first one seen so far (else -1)
--   c       where that search goes on
--   w       what the algorithm knows of its measures
--   =...    a lease
-- The key has a time to live from the script that makes it, so no key is ever without.
--
-- Each run makes all its functions and tables anew. So what is seldom needed is behind what is often, tables that fill
-- up are made with room, and functions use the globals of the server rather than locals, which every one of them would
-- have to be tied to.

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
