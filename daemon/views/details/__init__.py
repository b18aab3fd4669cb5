"""
One thing in full, where a list has a line for it: what needs a person, a drop, a run's curves and settings.

In: an `Overview`. Out: values that the page, the API and the command line show. `attention` is what to look at first,
`drop` a drop with its rows and its findings, `curves` how a training goes, `changes` what a run did otherwise than the
one that made the champion, `deeds` what came of a person's word. Open `attention` first.
"""
