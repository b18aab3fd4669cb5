"""
Take a run through its steps and apply the verdict.

In: queued runs. Out: published steps, then the effects of the verdict. `dispatcher` chooses the next step and publishes
results; `step_specs` builds a step's spec, `spool` hands it to `worker`, a process of its own that starts one process
per step; `stale_steps` unpublishes steps whose inputs have changed; `apply_verdict` promotes, or puts drops on trial,
and ends the run; `upkeep` does what concerns all runs. README.md says why. Open `dispatcher` first.
"""
