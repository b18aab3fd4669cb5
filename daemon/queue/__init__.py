"""
The states of runs and drops, in the database.

In: accepted drops, schedules, claims. Out: rows changed by compare-and-set, each with its event in one transaction.
`states` has the changes of state that a run may make, and the attempts at its steps; `run_queue` makes the changes;
`attempt_ends` has what follows from each end of an attempt; `order` has the order in which runs begin; `snapshots` the
drops that a run uses; `suspects` tries new drops after a bad verdict; `leave_one_out` trains without one old drop while
nothing else is to be done, and queues the runs of both; `nightly` finds the nights that are due. README.md says why.
Open `states`, then `run_queue`.
"""
