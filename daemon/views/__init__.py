"""
Read-only answers for every surface: terminal, page, JSON, metrics.

In: the database, opened for reading by `reader`, and the files that runs published. Out: plain objects. Nothing here
changes anything, and it works with the daemon down. `overview` answers `dropforge status` and the lists,
`champion_history` says what served when, `compare_runs` lays two runs side by side, `doctor` says what is wrong with a
machine; `details/` has one thing in full, `live/` what goes on now. Open `overview` first.
"""
