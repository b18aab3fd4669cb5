"""
Read-only answers for every surface: terminal, page, JSON, metrics.

In: the database, opened for reading by `reader`, and the files that runs published. Out: plain objects. Nothing here
changes anything, and it works with the daemon down. `overview` answers `dropforge status` and the lists,
`champion_history` says what served when, `compare_runs` lays two runs side by side, `doctor` says what is wrong with a
machine; `now` has what goes on, `queue` what waits, `awaited` how a run or drop ended that somebody waits for;
`details/` has one thing in full. Open `overview` first.
"""
