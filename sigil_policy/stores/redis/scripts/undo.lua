-- Take an admission back whose answer nobody waited for: as if the request had not come, where that is still counted.
--
-- asked    the cost that was charged to each request window; when
-- ARGV     behind the names of the measures: the note of the admission
-- reply    0
-- Promise: the lease ends and gives back what it holds; request windows that have ended meanwhile get nothing.

local cost, at = asked[1], asked[2]
local notes = ARGV[levels + 4]
if notes then
  notes = { struct.unpack('<' .. string.rep('d', #notes / 8), notes) }
end
local seen = 0

for level = 1, levels do
  open(level)
  local amounts, parts = held(level)
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    if plan[3 * w] <= requests then
      local need = math.min(cost, plan[3 * w + 1])
      if notes then
        give(w, need, { unpack(notes, seen + 1, seen + WIDTH) })
        seen = seen + WIDTH
      else
        give(w, need, charged_at(w, need, at))
      end
    elseif amounts then
      give(w, amounts[w], parts[w])
    end
  end
  if amounts then
    forget(level)
  end
  save(level)
end
return 0
