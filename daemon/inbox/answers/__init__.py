"""
Files for people in the inbox: receipts, verdict notes and README.txt.

In: drops and runs as the database has them. Out: files in `done/`, `rejected/` and the folders for drops.
`receipts` writes the receipt or error list of a file when it is taken, `remarks` has sentences on what happens next,
`verdict_notes` keeps each drop's outcome next to its receipt, `folder_texts` keeps README.txt, `rejected` deletes old
rejected files.
Open `verdict_notes` first.
"""
