"""
Records become train, dev and held-out sets that share nothing.

In: the drops of a run. Out: frozen files and warnings about them. `split` places records, `decontaminate` finds what
the held-out set and the training data have in common. Open `split` first.
"""
