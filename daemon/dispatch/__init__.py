"""
Take a run through its steps and apply the verdict.

In: queued runs. Out: published steps, then what follows from the verdict. `dispatcher` decides what is next and
publishes what came back; `step_specs` words the order, `spool` hands it to `worker`, a process of its own that starts
one process a step; `apply_verdict` promotes, or puts drops on trial, and ends the run. README.md says why.
Open `dispatcher` first.
"""
