"""
Which model is live on each track, and every way in which that changes.

In: models that won, or that a person asks for. Out: the link `tracks/<track>/champion`, and hooks that notify the
server. `promotion` has the only functions that change a champion, row and link together or not at all; `decisions` has
the manual ones, `history` reads a track's promotion rows. `hooks/` runs the user's commands after a change, `handover/`
makes a server serve the champion, in `blind_review` people compare answers. README.md has the rules. Open `promotion`
first.
"""
