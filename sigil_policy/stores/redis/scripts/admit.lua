-- Decide one request: every window of every level, and the tokens that it reserves. All or nothing.
--
-- asked    the cost in each request window; 1 if tokens are reserved; how many in each token window of the plan
-- reply    numbers of 8 bytes: 1 if it is admitted, 0 if not, 2 if not and it might be before the moments said; the
--          moment of the decision; by window of the plan what is left; then by window when that is renewed, or for a
--          window that refuses when it would have admitted. Then, where the algorithm needs one, a note for undo.lua
-- Complexity: a fixed number of commands for each level.

local cost, reserving = asked[1], asked[2] == 1
local admitted, needs = 1, { 0, 0, 0, 0, 0, 0, 0, 0 }

for level = 1, levels do
  open(level)
end
for w = 1, windows do
  local place, need = plan[3 * w], nil
  if place <= requests then
    -- A cost over the limit takes the window whole; a cost of nothing asks no window.
    if cost > 0 then
      need = math.min(cost, plan[3 * w + 1])
    end
  elseif reserving then
    need = math.max(asked[2 + place - requests], 1)
  end
  if need and left[w] < need then
    admitted = 0
  end
  needs[w] = need or false
end

local notes
if admitted == 1 then
  notes = NOTE and {}
  for level = 1, levels do
    local lease
    for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
      local place = plan[3 * w]
      if place <= requests then
        take(w, needs[w] or 0)
        if notes then
          part(w, needs[w] or 0, notes)
        end
      elseif reserving then
        local amount, parts = asked[2 + place - requests], {}
        take(w, amount)
        part(w, amount, parts)
        lease = hold(lease, level, w, amount, parts)
      end
    end
    if lease or cost > 0 then
      save(level, lease)
    end
  end
end

local rows = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
for w = 1, windows do
  local place = plan[3 * w]
  rows[place] = math.max(math.floor(left[w]), 0)
  rows[windows + place] = reset(w, needs[w], admitted == 1)
end
if rough and admitted == 0 then
  admitted = 2
end
local reply = struct.pack('<i8i8' .. string.rep('i8', 2 * windows), admitted, now, unpack(rows, 1, 2 * windows))
return notes and reply .. struct.pack('<' .. string.rep('d', #notes), unpack(notes)) or reply
