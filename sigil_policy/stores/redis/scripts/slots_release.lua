-- Gives the places of one slot back.
--
--   KEYS    the sorted sets that it is in
--   ARGV    its id
--   reply   in how many of them it was
--
-- Doing it again, or for a slot that was never taken, changes nothing. A set goes with its last member.

local found = 0
for _, key in ipairs(KEYS) do
    found = found + redis.call('ZREM', key, ARGV[1])
end
return found
