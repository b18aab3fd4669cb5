"""
Split records into train, dev and held-out sets that share nothing.

In: the drops of a run. Out: frozen files, and warnings about them. `partitions` reads the drops, `split` says where a
record goes, `decontaminate` removes what held-out and training data have in common and groups held-out records that
count as one, `start` chooses the model that the training starts from, `warnings` words what a person should know.
README.md has the rules. Open `step` first.
"""
