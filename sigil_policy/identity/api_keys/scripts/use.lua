-- When keys were last used.
--
--   KEYS    the hashes of records, and of uses
--   ARGV    pairs of an id and a moment; the caller bounds how many
--   reply   how many of them were news

local news = 0
for i = 1, #ARGV, 2 do
    local known = redis.call('HGET', KEYS[2], ARGV[i])
    if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 and (not known or tonumber(known) < tonumber(ARGV[i + 1])) then
        redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
        news = news + 1
    end
end
return news
