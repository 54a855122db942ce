-- Keeps a ticket, unless its holder or the store has as many as there may be.
--
--   KEYS    the ticket; a sorted set of all tickets by the millisecond in which each ends; a sorted set of them by name,
--           all with the score 0
--   ARGV    the ticket's name: 16 bytes for the holder, then the digest; the record; milliseconds that it holds; how many
--           the holder may have; how many there may be
--   reply   0; else nothing was kept: milliseconds until the holder may have another, or, negative, until one of all ends
--
-- A holder's tickets are those whose names begin with it. At most 100 of the others that have ended are forgotten by one
-- call; those that are not forgotten yet are not counted.

local ticket, ends, names = KEYS[1], KEYS[2], KEYS[3]
local name, record, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local most, max = tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local ended = redis.call('ZRANGEBYSCORE', ends, '-inf', string.format('%.0f', now), 'LIMIT', 0, 100)
if #ended > 0 then
    redis.call('ZREM', ends, unpack(ended))
    redis.call('ZREM', names, unpack(ended))
end

local holder = string.sub(name, 1, 16)
local held, first = 0, nil
for _, other in ipairs(redis.call('ZRANGEBYLEX', names, '[' .. holder, '[' .. holder .. string.rep('\255', 33))) do
    local till = tonumber(redis.call('ZSCORE', ends, other) or '0')
    if till > now then
        held = held + 1
        first = math.min(first or till, till)
    else
        redis.call('ZREM', ends, other)
        redis.call('ZREM', names, other)
    end
end
if held >= most then
    return first - now
end
if redis.call('ZCOUNT', ends, '(' .. string.format('%.0f', now), '+inf') >= max then
    return now - tonumber(redis.call('ZRANGEBYSCORE', ends, '(' .. string.format('%.0f', now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2])
end

local last = string.format('%.0f', now + ttl)
redis.call('SET', ticket, holder .. record, 'PX', ARGV[3])
redis.call('ZADD', ends, last, name)
redis.call('ZADD', names, 0, name)
-- No ticket holds longer: both go some time after the last.
redis.call('PEXPIRE', ends, 360000)
redis.call('PEXPIRE', names, 360000)
return 0
