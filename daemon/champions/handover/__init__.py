"""
Hand the champion over: to a server, which has to answer as it did, and to a folder elsewhere.

In: a champion, and the answers that its evaluation recorded. Out: a server that was checked, or a folder.
`smoke_prompts` chooses the prompts for the check, `server` makes a server serve the champion, `export` copies the
champion. Open `server` first.
"""
