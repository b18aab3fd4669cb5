"""
Preview a drop before anything is trained on it.

In: the drops up to this one, the champion. Out: its mean score on new records of the drop. Open `step` first.
"""
