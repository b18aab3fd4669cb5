"""
Notifications through Apprise, and a heartbeat for an external monitor.

In: the events of the database, from a cursor on. Out: messages, as rows that are written in one transaction with the
cursor and sent by a thread of their own, in order and once; twice at most if the daemon is killed between sending and
noting it.
`texts` words what is told at once, `digest` the rest; `outbox` writes the rows, `delivery` alone speaks to a network,
`messenger` is the thread. Open `texts` first.
"""
