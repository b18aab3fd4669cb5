"""
Score an answer against its references: a number from 0 to 1.

In: two texts in any script. Out: a number. `registry` has every metric: adding one is an entry there and its name in
`pipeline.config`. `tokens` splits words, `json_fields` compares JSON, `degenerate` detects degenerate and collapsed
answers, and `automatic` chooses a metric by the references. Open `registry` first.
"""
