-- A new key, and the end of another one in the same step.
--
--   KEYS    the hashes of records, and of ends
--   ARGV    the new id, its record, its end or '', the id of the other or '', when that ends
--   reply   1 if it was stored, 0 if its id is taken, -1 if the other is not there
--
-- Nothing is written before everything was looked at. An end is never put off.

local id, record, ends, other, at = unpack(ARGV)
if redis.call('HEXISTS', KEYS[1], id) == 1 then
    return 0
end
if other ~= '' then
    if redis.call('HEXISTS', KEYS[1], other) == 0 then
        return -1
    end
    local known = redis.call('HGET', KEYS[2], other)
    if not known or tonumber(at) < tonumber(known) then
        redis.call('HSET', KEYS[2], other, at)
    end
end
if ends ~= '' then
    redis.call('HSET', KEYS[2], id, ends)
end
redis.call('HSET', KEYS[1], id, record)
return 1
