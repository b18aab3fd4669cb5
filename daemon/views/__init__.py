"""
Read-only views of the state for the terminal, the web page, JSON output and metrics.

In: the database, opened for reading by `reader`, and the files that runs published. Out: plain objects. Only
`attention.dismiss` writes, and no daemon need run. `overview` has all queries: those of `runs`, `drops` and
`champion_history`, the evidence of a run, and what concerns the whole workspace; `attention` has what needs a person,
`doctor` what is wrong with a machine. Open `overview` first.
"""
