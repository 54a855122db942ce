-- Some of the keys.
--
--   KEYS    the hashes of records, of ends, and of uses
--   ARGV    the cursor: '0' to begin with
--   reply   the next cursor ('0' at the end), then for each key its id, record, end and last use, false where there is none
--
-- As with every scan, a key may come twice, and one that is there from the first page to the last comes for sure.

local page = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', 200)
local reply = {page[1]}
for i = 1, #page[2], 2 do
    local id = page[2][i]
    reply[#reply + 1] = id
    reply[#reply + 1] = page[2][i + 1]
    reply[#reply + 1] = redis.call('HGET', KEYS[2], id)
    reply[#reply + 1] = redis.call('HGET', KEYS[3], id)
end
return reply
