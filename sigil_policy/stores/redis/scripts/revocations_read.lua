-- What has changed since a revision, or everything: one page of it.
--
--   KEYS    as revocations_write.lua has them
--   ARGV    the epoch (empty: none) and the revision that the caller knows; how many entries a page has; 1 if this is
--           not the first page
--   reply   the epoch; 0: changes, 1: everything, for the changes are not known any more, 2: everything, for the server
--           lacks what the caller has seen; the revision read so far; 1 if there is no more; then names and entries
--
-- Complexity: O(log n + page).

local state = redis.call('HMGET', KEYS[1], 'epoch', 'revision', 'floor')
local epoch, revision, floor = state[1] or '', tonumber(state[2] or '0'), tonumber(state[3] or '0')
local from, page = tonumber(ARGV[2]), tonumber(ARGV[3])

local how = 0
if ARGV[1] == '' then
    from = 0
elseif epoch ~= ARGV[1] or from > revision then
    how, from = 2, 0
elseif from < floor and ARGV[4] ~= '1' then
    how, from = 1, 0
end

local found = redis.call('ZRANGEBYSCORE', KEYS[3], string.format('(%.0f', from), '+inf', 'WITHSCORES', 'LIMIT', 0, page)
local reply = { epoch, how, string.format('%.0f', revision), 1 }
local names = {}
for i = 1, #found, 2 do
    names[#names + 1] = found[i]
end
if #names == page then
    reply[3], reply[4] = string.format('%.0f', found[#found]), 0
end
if #names > 0 then
    local values = redis.call('HMGET', KEYS[2], unpack(names))
    for i, name in ipairs(names) do
        reply[#reply + 1] = name
        reply[#reply + 1] = values[i] or '0 0'
    end
end
return reply
