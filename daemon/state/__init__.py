"""
The state folder: the database, the run folders, and who may use them.

In: rows and artifacts. Out: the same, durable and checked. `tables` has the rows, `states` a sentence for each state,
`database` opens and migrates them, `events` records each change, `run_files` publishes what a step made, `layout`
names the files, `ownership` keeps other users out. Open `tables` first.
"""
