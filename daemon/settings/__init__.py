"""
`dropforge.toml` and environment variables become one checked `Settings`.

`model` has every setting with its default and its bounds; a wrong one ends in an error that names it.
"""
