"""
Hyperparameter search: several trainings (trials) in one run; the dev rows choose one.

In: a run with a space in [train.search], and a function that trains once. Out: the chosen adapter, and the outcome of
every trial. `run` runs trial after trial and chooses one, `suggest` draws settings from Optuna or the grid, `trials`
stores the state of each trial in the run's checkpoint folder, so that a killed search resumes. Open `run` first.
"""
