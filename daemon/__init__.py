"""
Time, state and people: the only package with a clock, a database and a command line.

`service` composes everything; `watcher` and `intake` turn files into drops, `queue` owns the runs' states,
`dispatcher` sends steps to an executor and publishes what came back, `champions` promotes.
"""
