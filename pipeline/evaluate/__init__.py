"""
Evaluate models and score their answers.

In: model folders, held-out records, suites of general abilities. Out: predictions, cached by a key of all that they
depend on, and scores for the gate. `plan` says what each model is prompted with, `inference` prompts it, `scoring`
scores. README.md says why. Open `plan` first.
"""
