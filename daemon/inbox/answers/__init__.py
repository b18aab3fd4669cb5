"""
What people find in the inbox: receipts, verdicts beside them, README.txt, WANTED.md.

In: drops and runs as the database has them. Out: files in `done/`, `rejected/` and the folders for drops.
`receipts` answers a file when it is taken, `remarks` says what comes of it, `story` what became of it; `verdict_notes`
keeps that beside the receipt. `readme` and `wanted` are texts, `own_files` writes them where others may write.
Open `story` first.
"""
