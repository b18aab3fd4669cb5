"""
What people find in the inbox: receipts, verdicts beside them, README.txt, WANTED.md.

In: drops and runs as the database has them. Out: files in `done/`, `rejected/` and the folders for drops.
`receipts` answers a file when it is taken, `remarks` says what comes of it, `verdict_notes` what became of it, kept
beside the receipt; `folder_texts` keeps README.txt and WANTED.md, `rejected` removes old files that were given back.
Open `verdict_notes` first.
"""
