-- One key.
--
--   KEYS    the hashes of records, and of ends
--   ARGV    the id
--   reply   its record and its end, each false where there is none

return {redis.call('HGET', KEYS[1], ARGV[1]), redis.call('HGET', KEYS[2], ARGV[1])}
