"""
One training in several processes, a card for each.

In: what `fit` takes. Out: what `fit` gives. Each process holds the whole base and the adapter, sees the same optimizer
steps, and computes a share of each step's records; `sharing` divides the records and sums the gradients, `launch`
starts the processes, stops them, and ends them all with the first that dies. Open `launch` first.
"""
