"""
Split records into train, dev and held-out sets that have no prompt in common.

In: the drops of a run. Out: frozen files, and warnings about them. `step` goes through it in order, each function
returns a value, and the files are written once: `split` reads the drops' rows, and chooses each prompt's split by its
hash; `step` leaves out what the base model's chat template refuses; `decontaminate` decides what is a near-duplicate:
it assigns the rest, without training rows that are near-duplicates of held-out records, and groups similar held-out
records; `near_duplicates` compares two texts; `sample` selects the records that are scored; `start` chooses the model
that the training starts from, and adds general rows; `warnings` finds the warnings, and counts rows whose answers are
not used. README.md has the rules. Open `step` first.
"""
