"""
Train an adapter, or weights of the base itself.

In: a base model's folder, rows, settings. Out: an adapter or weights, loss curves, checkpoints to go on from.
`tokenise` turns rows into tokens, `fit` trains, `method` makes PEFT's and the trainer's arguments of the settings,
`row_order` says which rows make an optimizer step, `passes/` computes it, `watcher` measures the dev loss and ends a
training that went wrong, `checkpoints` publishes and finds checkpoints, `memory` finds what fits. `data_parallel/`
trains on several devices, `methods/` trains the base itself, `search/` trains several times. Open `step` first.
"""
