"""
Turn lines of a dropped file into records or findings.

In: a file from anybody. Out: the number of good rows, and for each bad row its line, field, error and remedy.
`fast_path` recognises plain rows quickly; `records` reads all others and checks their texts; `row_findings` says what
is wrong with one by `schemas/alpaca-record.schema.json`, `validate` with a file; `heldout` hashes prompts and has the
held-out records. Open `validate` first.
"""
