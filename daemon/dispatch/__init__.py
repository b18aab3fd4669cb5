"""
Take a run through its steps and apply the verdict.

In: queued runs. Out: published steps, then the effects of the verdict. `facts` reads what a run's next action depends
on, `next_action` decides it, `dispatcher` performs it; `step_specs` builds a step's spec; `attempt` has what an attempt
at a step is, on each machine; `spool` hands one to `worker`, a process of its own that starts one process per step or
forks it (`preloaded`), and `slurm`, with `slurm_jobs`, to a cluster; `stale_steps` finds steps whose inputs have
changed; `apply_verdict` promotes, or puts drops on trial, and ends the run; `claimer` claims due runs, `publication`
publishes in threads, `upkeep` does what concerns all runs, and `previews` lets champions answer new drops between them.
README.md says why. Open `next_action` first.
"""
