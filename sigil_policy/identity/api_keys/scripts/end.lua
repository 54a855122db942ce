-- Lets a key end, unless it ends before that anyway.
--
--   KEYS    the hashes of records, and of ends
--   ARGV    the id, when it ends
--   reply   its record and its end, each false where there is none

local record = redis.call('HGET', KEYS[1], ARGV[1])
local known = redis.call('HGET', KEYS[2], ARGV[1])
if record and (not known or tonumber(ARGV[2]) < tonumber(known)) then
    known = ARGV[2]
    redis.call('HSET', KEYS[2], ARGV[1], known)
end
return {record, known}
