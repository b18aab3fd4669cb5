"""
Tell people what happened, through Apprise, and a watcher that the daemon lives.

In: the events that every change of a state leaves, from a cursor on. Out: rows of `message`, written in one transaction
with the cursor, and sent by a thread of their own: in order, once; twice at most if the daemon is killed between
sending and noting it. Nothing waits for it. `texts` says what is told at once, `digest` what once a day, `outbox` is
the only writer of the rows, `delivery` alone speaks to a network, `messenger` is the thread. Open `texts` first.
"""
