"""
Which model is live on each track, and every way in which that changes.

In: models that won, or that a person asks for. Out: the link `tracks/<track>/champion`, and hooks that tell the server.
`promotion`, `approval` and `rollback` decide what may change; `journal` alone moves the row and swaps the link, whole
or not at all; `hooks/` runs the user's commands after it, `handover/` lets a server take it, in `review/` people judge
blind. README.md has the rules. Open `journal` first.
"""
