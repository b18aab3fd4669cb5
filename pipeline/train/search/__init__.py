"""
Hyperparameter search: several trainings (trials) in one run; the dev rows choose one.

In: a run with a space in [train.search], and a function that trains once. Out: the chosen adapter, and the outcome of
every trial. `run` runs trial after trial, `suggest` draws settings from Optuna or the grid and prunes, `trial_files`
stores the search's state in the run's checkpoint folder, so that a killed search resumes, `trial_attempt` is the
attempt of one trial, `dev_scores` scores a trained adapter on the dev rows, `soup` combines two adapters. Open `run`
first.
"""
