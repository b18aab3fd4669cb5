"""
One thing in full, where a list has a line for it: what needs a person, a drop, what a track lacks.

In: an `Overview`. Out: values that the page, the API and the command line show. `attention` is what to look at first,
`drop` a drop with its rows and its findings, `missing_rows` what a track lacks for a verdict, `deeds` the
actions of the page with their confirmations. Open `attention` first.
"""
