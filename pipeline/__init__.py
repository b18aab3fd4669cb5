"""
The work: functions from files to files, run one step a process. It knows no queue, no database and no schedule.

In: an order (`contract.StepSpec`) and the artifacts of earlier steps. Out: one artifact in the attempt's folder.
`steps` is the order of the work; the other folders do it: `validation`, `dataset` and `near_duplicates` for data,
`qlora` for models, `metrics` and `evaluation` for scores, `gate` for the decision, `report` for the evidence card.
The daemon calls this package, never the other way round. Open `steps`, then `contract` and `artifacts`.
"""
