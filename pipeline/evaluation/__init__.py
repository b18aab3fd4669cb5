"""
Models are asked, their answers scored.

In: a model folder and held-out records or suites. Out: predictions, kept by what they depend on, and scores. `plan`
says what is asked of whom, `inference` asks, `scoring` scores. Open `plan` first.
"""
