"""
Training weights of the base itself instead of an adapter beside it.

In: a loaded base, its files, the settings. Out: the base with some weights as float32 masters, all others frozen, and a
file of the trained ones. `choice` says which are trained and keeps them, `spectrum` finds the layers of most signal to
noise, `galore` is an optimizer on projected gradients. Open `choice` first.
"""
