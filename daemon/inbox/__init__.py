"""
Turn a dropped file into a drop, or reject it and write the reasons next to it.

In: files that anybody may have written. Out: rows in `drop` with their bytes in the state folder, or files in
`rejected/`. `loop` drives the rest: `watcher` finds the files that are complete, `safe_copy` copies an untrusted file,
`intake` accepts or rejects it (`pipeline.records` validates the rows), `answers` writes receipts and notes for people
into the inbox. Open `intake` first.
"""
