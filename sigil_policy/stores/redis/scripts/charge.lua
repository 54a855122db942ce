-- Count what has happened already, whatever the limits say.
--
-- asked    how much in each window of the plan
-- reply    0; the moment; what is left in each token window

for level = 1, levels do
  open(level)
  for w = plan[last + 5 * level + 3], plan[last + 5 * level + 4] do
    pour(w, asked[plan[3 * w]])
  end
  save(level)
end
return tokens_left({ 0, now })
