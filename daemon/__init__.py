"""
Time, state and people: the only package with a clock, a database and a command line.

In: files in the inbox, commands of people. Out: runs whose steps `pipeline` does, and the model that serves.
A file goes through `inbox`, `queue`, `dispatch` and `champions`. `cli`, `web` and `views` show it, `messages` and
`metrics` tell of it, `storage` keeps room for it; `state`, `settings` and `system` are what all of them stand on.
Imports run downwards only.
Open `service` first: it builds the daemon from all of these.
"""
