"""
The state folder: the database, the run folders, and who may use them.

In: rows and artifacts. Out: the same, durable and checked. `tables` defines the rows,
`column_rules` what SQLite refuses in them, `states` documents their states, `database` opens and creates the database,
`events` records each change, `queries` and `questions` have what is asked in several places, `clauses` words what rows
store, `run_files` publishes the results of steps, `layout` names the files, `ownership` keeps other users out.
Open `tables` first.
"""
