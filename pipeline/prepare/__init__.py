"""
Split records into train, dev and held-out sets that share nothing.

In: the drops of a run. Out: frozen files, and warnings about them. `snapshot_reader` reads the drops, `split` says
where a record goes, `decontaminate` takes out what held-out and training data have in common, `groups` says which
held-out records count as one, `warnings` words what a person should know. README.md has the rules. Open `split` first.
"""
