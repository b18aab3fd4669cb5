"""
Read-only views of the state for the terminal, the web page, JSON output and metrics.

In: the database, opened for reading by `reader`, and the files that runs published. Out: plain objects. Only
`attention.dismiss` writes, and no daemon need run. `overview` has runs, drops and tracks, `drops` one drop
in full, `champion_history` which model served when, `reports` the evidence of a run,
`attention` what needs a person, `doctor` what is wrong with a machine. Open `overview` first.
"""
