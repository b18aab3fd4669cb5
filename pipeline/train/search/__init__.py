"""
Several trainings in one run, of which the dev rows choose one.

In: a run with a space in [train.search], and a function that trains once. Out: the chosen adapter, and what became of
all candidates. `run` goes from trial to trial, `suggest` asks Optuna or the grid for settings and whether to go on,
`trial_files` keeps what is known in the run's checkpoint folder, so that a killed search goes on where it was,
`trial_attempt` is the step's attempt as one trial sees it, `dev_scores` asks a trained adapter the dev rows, `soup`
combines two adapters. Open `run` first.
"""
