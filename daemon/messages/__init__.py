"""
Notifications through Apprise.

In: the events of the database after a cursor. Out: messages, as rows that are written in one transaction with the
cursor and sent by a separate thread, in order and once; twice if the daemon is killed between sending and recording
it.
`texts` words the messages sent at once, `digest` all other events; `outbox` writes and sends the rows, and only
`delivery` uses the network. Open `texts` first.
"""
