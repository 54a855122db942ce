-- Revokes, or takes back, what a name stands for.
--
--   KEYS    a hash ("epoch", "revision", "floor"); a hash of the entries by name; a sorted set of the names by the
--           revision that changed each last; a sorted set of the names by the moment at which each ends
--   ARGV    the moment by the caller's clock; the name; before, until (seconds); how many entries there may be; a name
--           for this set of entries if it is new; 1 to take back
--   reply   1; 0 if there was nothing to take back; -1 if the store is full
--
-- An entry is "before until". What was taken back is "0 until" for an hour: whoever reads the changes learns of it.
-- `floor` is the last revision of which that has been forgotten: who has not read so far must read everything.
--
-- A revision is a millisecond of the server's clock, or the next number: after a failover to a server that lacks the
-- newest, new ones are still beyond all that anybody has read. An entry ends when both clocks, the caller's and the
-- server's, say so: none of them alone can end one early. At most 100 ended ones are forgotten by one call.

local FOREVER, TAKEN_BACK = 1e15, 3600
local meta, entries, log, ends = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local time = redis.call('TIME')
local server = time[1] + time[2] / 1000000
local now = math.min(tonumber(ARGV[1]), server)
local name, before, till, taking = ARGV[2], ARGV[3], ARGV[4], ARGV[7] == '1'

local ended = redis.call('ZRANGEBYSCORE', ends, '-inf', string.format('%.6f', now), 'LIMIT', 0, 100)
if #ended > 0 then
    local values = redis.call('HMGET', entries, unpack(ended))
    local floor = tonumber(redis.call('HGET', meta, 'floor') or '0')
    for i, gone in ipairs(ended) do
        if values[i] and string.sub(values[i], 1, 2) == '0 ' then
            floor = math.max(floor, tonumber(redis.call('ZSCORE', log, gone) or '0'))
        end
    end
    redis.call('HSET', meta, 'floor', string.format('%.0f', floor))
    redis.call('HDEL', entries, unpack(ended))
    redis.call('ZREM', log, unpack(ended))
    redis.call('ZREM', ends, unpack(ended))
end

local known = redis.call('HGET', entries, name)
local old_before, old_till
if known then
    old_before, old_till = string.match(known, '^(%S+) (%S+)$')
end
local was = known and old_before ~= '0' and tonumber(old_till) > now
if taking then
    if not was then
        return 0
    end
    before, till = '0', string.format('%.3f', now + TAKEN_BACK)
elseif was then
    if tonumber(old_before) > tonumber(before) then
        before = old_before
    end
    if tonumber(old_till) > tonumber(till) then
        till = old_till
    end
elseif not known and redis.call('HLEN', entries) >= tonumber(ARGV[5]) then
    return -1
end

local revision = tonumber(redis.call('HGET', meta, 'revision') or '0') + 1
revision = string.format('%.0f', math.max(revision, math.floor(server * 1000)))
redis.call('HSETNX', meta, 'epoch', ARGV[6])
redis.call('HSET', meta, 'revision', revision)
redis.call('HSET', entries, name, before .. ' ' .. till)
redis.call('ZADD', log, revision, name)
redis.call('ZADD', ends, till, name)

-- All of it goes with the last entry.
local last = tonumber(redis.call('ZREVRANGE', ends, 0, 0, 'WITHSCORES')[2])
for _, key in ipairs(KEYS) do
    if last >= FOREVER then
        redis.call('PERSIST', key)
    else
        redis.call('PEXPIRE', key, string.format('%.0f', math.max(last - now, TAKEN_BACK) * 1000))
    end
end
return 1
