"""
The work: functions from files to files, run one step a process. It knows no queue, no database and no schedule.

In: an order (`contract.StepSpec`) and the artifacts of earlier steps. Out: one artifact in the attempt's folder.
A folder is a step, with its function in `step.py`: `prepare`, `train`, `merge`, `evaluate`, `judge`, `decide`. They
use `records` (one line of a file), `models` (model folders), `metrics` (one answer) and `report` (the evidence card).
The daemon calls this package, never the other way round. Open `steps`, then `contract` and `artifacts`.
"""
