"""
Hand the champion over: to a server, which has to answer as it did, and to a folder elsewhere.

In: a champion, and what its evaluation recorded. Out: a server that was asked, or a folder. `smoke_prompts` chooses
what a server is asked, `server` lets it take the champion, `export` copies the champion. Open `server` first.
"""
