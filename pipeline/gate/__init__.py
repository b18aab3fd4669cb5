"""
Scores become a decision.

Pure: numpy and scipy, no file, no model. `comparison` and `guards` weigh, `statistics` and `power` have the tests with
their sources, `explain` says it in one line.
"""
