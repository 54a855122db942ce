-- Takes a ticket, once.
--
--   KEYS    as tickets_issue
--   ARGV    the ticket's digest
--   reply   its record, or nothing

local found = redis.call('GETDEL', KEYS[1])
if not found then
    return nil
end
local name = string.sub(found, 1, 16) .. ARGV[1]
redis.call('ZREM', KEYS[2], name)
redis.call('ZREM', KEYS[3], name)
return string.sub(found, 17)
