"""
One training in several processes, a card for each.

In: a training, its rows and settings. Out: how it went, as from one process. Each process holds the base and the
adapter, sees the same optimizer steps, and computes a share of each one's records; `sharing` divides the records and
sums the gradients, `launch` starts the processes, stops them, and ends them all with the first that dies.
Open `launch` first.
"""
