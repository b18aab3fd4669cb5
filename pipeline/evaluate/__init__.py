"""
Ask models and score their answers.

In: model folders, held-out records, suites of general abilities. Out: predictions, cached under all that they depend
on, and scores for the gate. `plan` says what is asked of whom, `inference` asks, `scoring` scores; `judge_session` asks
the optional LLM judge. README.md says why. Open `plan` first.
"""
