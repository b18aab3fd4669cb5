"""
A file becomes a drop.

In: files that anybody may write. Out: rows in `drop` with their bytes in the state folder, or files in `rejected/`
with the reason beside them. `folders` walks the inbox by descriptors, `watcher` says which files are ready, `intake`
takes one, `receipts` files it away. Open `intake` first.
"""
