"""
Data-parallel training: one process per GPU.

In: a training, its rows and settings. Out: its result, as from one process. Each process holds the base and the
adapter, runs the same optimizer steps, and computes a share of each step's records; `sharing` divides the records and
sums the gradients, `launch` starts and stops the processes, and ends all of them when one dies. Open `launch` first.
"""
