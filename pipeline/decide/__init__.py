"""
Turn scores into a decision. numpy and scipy only; no model, no network, no database.

In: both models' scores on the same records. Out: a verdict with its numbers, reasons and a sentence. `comparison` reads
them side by side, `guards` has what stops a win, `statistics` the tests, `power` what they can show, `verdict` decides,
`explain` has the words. README.md has shapes, formulas' sources and the reasons for tests and margins.
Open `verdict` first.
"""
