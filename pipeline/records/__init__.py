"""
Turn lines of a dropped file into records or findings.

In: a file from anybody. Out: the number of good rows, and for each bad row its line, field, error and remedy.
`fast_path` recognises plain rows quickly; `records` reads all others and checks their texts; `validate` checks each row
with `schemas/alpaca-record.schema.json`; `heldout` hashes prompts and has the held-out records. Open `validate` first.
"""
