"""
Read-only answers for every surface: terminal, page, JSON, metrics.

In: the database, opened for reading by `reader`, and the files that runs published. Out: plain objects. Nothing here
changes anything, and it works with the daemon down. `overview` answers the questions about runs, drops and tracks;
`now` has what goes on, `drop_detail` one drop in full, `champion_history` which model served when, `compare_runs` two
runs side by side, `attention` what needs a person, `doctor` what is wrong with a machine. Open `overview` first.
"""
