"""
Which run begins next, and a person's word on it.

In: runs that are queued or wait. Out: those that may be claimed, in their order. `order` has the order and its change
by a person; `pausing` the tracks that begin no run. Open `order`.
"""
