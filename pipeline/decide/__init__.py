"""
Turn scores into a decision. numpy and scipy only; no model, no network, no database.

In: both models' scores on the same records. Out: a verdict with its numbers, and reasons. `policy` has the
thresholds and the table of guards, `comparison` reads the scores, `guards` has the checks that block a promotion,
`statistics` the tests, `power` the smallest gain that they detect, `verdict` decides, `explain` words it.
README.md has shapes, formulas' sources and the reasons for tests and margins. Open `verdict` first.
"""
