-- A sign of life from a process: the slots that it holds go on for another while.
--
--   KEYS    the sorted sets that these slots are in
--   ARGV    milliseconds that they hold from now on; then for each key how many slots there are, and their ids
--   reply   how many of them were there no more
--
-- A slot that is not there is added: what it stands for is in flight, although the server has lost it, or never heard of
-- it because it was away. The caller bounds how many slots one call renews.

local time = redis.call('TIME')
local ttl = tonumber(ARGV[1])
local expires = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ttl)

local lost = 0
local at = 2
for _, key in ipairs(KEYS) do
    local count = tonumber(ARGV[at])
    local members = {}
    for i = at + 1, at + count do
        members[#members + 1] = expires
        members[#members + 1] = ARGV[i]
    end
    lost = lost + redis.call('ZADD', key, unpack(members))
    if redis.call('PTTL', key) < ttl then
        redis.call('PEXPIRE', key, ttl)
    end
    at = at + count + 1
end
return lost
