"""
The state folder: the database, the run folders, and who may use them.

In: rows and artifacts. Out: the same, durable and checked. `tables` defines the rows, `column_rules` the values that
SQLite refuses, `states` the states of rows. `database` opens and creates the database, `events` records each change,
`questions` holds shared queries, `clauses` puts stored values into words, `run_files` publishes the
results of steps, `layout` names the files, `ownership` keeps other users out. Open `tables` first.
"""
