"""
Turn a dropped file into a drop, or refuse it with the reason beside it.

In: files that anybody may have written. Out: rows in `drop` with their bytes in the state folder, or files in
`rejected/`. `watcher` says which files are complete, `safe_copy` copies one without trust, `intake` accepts or refuses
it (what is wrong with a row is found by `pipeline.records`), `answers` holds what people are told in the inbox.
Open `intake` first.
"""
