"""
The steps of a run: functions from files to files, each in a process of its own, without queue, database or schedule.

In: a spec (`contract.StepSpec`) and the artifacts of earlier steps. Out: one artifact in the attempt's folder.
A folder is a step, with its function in `step.py`: `prepare`, `train`, `merge`, `evaluate`, `judge`, `decide`, and
`preview`, which is in no run. They use `records` (one line of a file), `models` (model folders), `metrics` (one answer)
and `report` (the evidence card).
The daemon calls this package, never the other way round. Open `steps`, then `contract` and `artifacts`.
"""
