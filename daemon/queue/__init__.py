"""
The states of runs and drops, in the database.

In: accepted drops, schedules, claims. Out: rows changed by compare-and-set, each with its event in one transaction.
`states` has the moves that a run may make, and the attempts at its steps; `run_queue` makes the moves; `order` says
which run begins next; `snapshots` says which drops a run sees, `suspects` which of them are tried alone after a bad
verdict; `nightly` says which nights are due. README.md says why.
Open `states`, then `run_queue`.
"""
