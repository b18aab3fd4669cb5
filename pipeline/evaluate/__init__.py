"""
Evaluate models on held-out records and general suites, and score their answers.

In: model folders, held-out records, general suites. Out: predictions, cached under a key of everything they depend on,
and scores for the gate. `plan` lists the requests to each model, `inference` computes their values, `scoring` scores
them. README.md gives reasons. Open `plan` first.
"""
