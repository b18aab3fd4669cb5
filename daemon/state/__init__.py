"""
The state folder: the database, the run folders, and who may use them.

`tables` are the rows, `database` opens and migrates them, `run_files` publishes what a step made, `layout` names the
files. Open `tables` first.
"""
