"""
Dropped bytes become records or findings.

In: a file from anybody. Out: how many rows are good, and for each bad one file, line, field, what was expected and what
to do. `fast_path` passes plain rows at the speed of the disk; `records` has the rules. Open `validate` first.
"""
