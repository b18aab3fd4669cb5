"""
Which model is live on each track, and how that changes.

In: models that won or were asked for. Out: the link `tracks/<track>/champion`, and hooks that tell the server.
`journal` makes each change whole or not at all, `promotion` and `rollback` decide what changes. Open `journal` first.
"""
