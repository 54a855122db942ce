-- Reserve more for a lease that is open: all of it on every level, or nothing.
--
-- asked    for each token window of the plan how much is wanted more; then for each how much the caller holds: a lease
--          that has lapsed is made whole with it, or refused
-- reply    1 if it is reserved; the moment; what is left in each token window

local tokens = windows - requests
local amounts, parts, lacks = {}, {}, {}

for level = 1, levels do
  open(level)
  local has, its, whole = held(level)
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    local at = plan[3 * w] - requests
    if at > 0 then
      local before, lack = asked[tokens + at], asked[at]
      if has then
        amounts[w], parts[w] = has[w], its[w]
      else
        amounts[w], parts[w] = plan[last + 5 * level + 2] * before, {}
      end
      if not whole then
        lack = lack + before - amounts[w]
      end
      lacks[w] = lack
      if lack > 0 and left[w] < lack then
        return { 0, now }
      end
    end
  end
end
for level = 1, levels do
  local lease
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    local lack = lacks[w]
    if lack then
      if lack > 0 then
        take(w, lack)
        part(w, lack, parts[w])
      end
      lease = hold(lease, level, w, amounts[w] + lack, parts[w])
    end
  end
  if lease then
    save(level, lease)
  end
end
return tokens_left({ 1, now })
