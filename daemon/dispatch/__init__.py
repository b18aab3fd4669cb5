"""
A run is worked on, step by step, and its verdict is applied.

In: queued runs. Out: published steps, and what follows from the verdict. `dispatcher` decides what is next, `spool`
hands orders to `worker`, a process of its own, `apply_verdict` ends the run. Open `dispatcher` first.
"""
