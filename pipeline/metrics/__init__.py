"""
Score one answer beside its references: a number from 0 to 1.

In: two texts in any script. Out: a number. `registry` has every metric, and adding one is an entry there; `tokens`
splits words, `json_fields` compares JSON, `degenerate` detects empty, truncated and repetitive answers.
Open `registry` first.
"""
