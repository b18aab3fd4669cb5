"""
A model as a folder: what has to be in it, read without trusting who wrote it.

In: a folder from anybody. Out: its identity and manifest, or what is wrong with it. `manifest` names a model by the
hashes of its files; each other module reads one kind of file, within bounds. Open `manifest` first.
"""
