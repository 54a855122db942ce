-- Takes a place under every key, or under none.
--
--   KEYS    one sorted set for each claim: the ids of the slots in flight, scored by the moment at which each expires
--   ARGV    id of the new slot, milliseconds that it holds, then the limit of each claim
--   reply   1 or 0 (taken or not), then how many are in flight under each key, with the new one if it was taken
--
-- Time is the server's, so the clocks of the processes need not agree. What has expired does not count, and is removed
-- first: at most 100 for each key, so that no take pays for everybody who was killed. Counting is O(log n). Nothing is
-- written under the new id before every key was looked at; if the server is out of memory, the first write fails.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local id, ttl = ARGV[1], tonumber(ARGV[2])
local moment, expires = string.format('%.0f', now), string.format('%.0f', now + ttl)

local reply = {1}
for i, key in ipairs(KEYS) do
    local expired = redis.call('ZRANGEBYSCORE', key, '-inf', moment, 'LIMIT', 0, 100)
    if #expired > 0 then
        redis.call('ZREM', key, unpack(expired))
    end
    reply[i + 1] = redis.call('ZCOUNT', key, '(' .. moment, '+inf')
    if reply[i + 1] >= tonumber(ARGV[i + 2]) then
        reply[1] = 0
    end
end
if reply[1] == 0 then
    return reply
end

for i, key in ipairs(KEYS) do
    redis.call('ZADD', key, expires, id)
    -- The key goes with the last slot in it. Slots of another ttl may hold longer than this one.
    if redis.call('PTTL', key) < ttl then
        redis.call('PEXPIRE', key, ttl)
    end
    reply[i + 1] = reply[i + 1] + 1
end
return reply
