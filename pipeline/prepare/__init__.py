"""
Split records into train, dev and held-out sets that have no prompt in common.

In: the drops of a run. Out: frozen files, and warnings about them. `drop_rows` reads the drops, `split` assigns each
record to a split, `decontaminate` removes training rows that are near-duplicates of held-out records and groups similar
held-out records, `sample` chooses those that are scored, `replaced` counts the rows that later drops replace, `start`
chooses the model that the training starts from, `warnings` writes the warnings. README.md has the rules. Open `step`
first.
"""
