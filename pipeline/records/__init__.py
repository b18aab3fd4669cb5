"""
Turn dropped bytes into records or findings.

In: a file from anybody. Out: the number of good rows, and for each bad one its line, field, what was expected and what
to do. `fast_path` passes plain rows quickly; `records` reads all others; `text_checks` and `special_tokens` look at
texts; `validate` holds each row against `schemas/alpaca-record.schema.json`. Open `validate` first.
"""
