"""
The states of runs and drops, in the database.

In: accepted drops, schedules, claims. Out: rows changed by compare-and-set, each with its event in one transaction.
`states` is the only place that changes a run's state. Open `run_queue` first.
"""
