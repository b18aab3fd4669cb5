"""
The work: functions from files to files, run one step a process.

Order: prepare, train, merge, evaluate, decide (see `pipeline.steps`). This package knows no queue, no database and no
clock loop; the daemon calls it, never the other way round.
"""
