"""
`dropforge demo`: the whole loop on a real small model, through a real daemon.

`command` runs it, `data` makes its files from a seed. Open `command` first.
"""
