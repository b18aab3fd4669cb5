"""
Which model is live on each track, and every way in which that changes.

In: models that won, or that a person asks for. Out: the link `tracks/<track>/champion`, and hooks that tell the server.
`promotion` is the one way in which a champion changes, row and link together or not at all; `decisions` has what people
do with it, `history` says what a track's rows mean. `hooks/` runs the user's commands after a change, `handover/` lets
a server take it, in `blind_review` people compare answers. README.md has the rules. Open `promotion` first.
"""
