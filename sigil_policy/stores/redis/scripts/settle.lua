-- Replace the reservation of a lease by what was used, once.
--
-- asked    1 if this was not asked before; for each token window of the plan how much was used; then for each how much
--          the caller believes to hold
-- reply    0; the moment; what is left in each token window
-- Promise: what was used is charged once. A lease that is not there was settled by an earlier try whose reply got lost:
-- nothing changes. If there was no earlier try it has lapsed long since: what was used is charged (with "charged" only
-- what goes beyond the reservation). What is too much goes to the present window; what is too little comes back only
-- where it is still charged.

local tokens = windows - requests

for level = 1, levels do
  open(level)
  local amounts, parts = held(level)
  if amounts or asked[1] == 1 then
    local some = false
    for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
      local at = plan[3 * w] - requests
      if at > 0 then
        some = true
        local before = amounts and amounts[w] or plan[last + 5 * level + 2] * asked[1 + tokens + at]
        local over = asked[1 + at] - before
        if over > 0 then
          pour(w, over)
        elseif amounts and over < 0 then
          give(w, -over, parts[w])
        end
      end
    end
    if some then
      if amounts then
        forget(level)
      end
      save(level)
    end
  end
end
return tokens_left({ 0, now })
