"""
Train an adapter, or the base model's own weights.

In: a base model's folder, rows, settings. Out: an adapter or weights, loss curves, checkpoints to resume from.
`tokenise` turns rows into tokens, `training` runs the trainer, `method` translates settings into PEFT's and the
trainer's arguments, `row_order` assigns rows to optimizer steps, `passes/` computes the loss of micro-batches,
`watcher` measures the dev loss and stops a diverged training, `checkpoints` writes and finds checkpoints, `memory`
plans memory. `data_parallel/` trains on several devices, `methods/` trains the base's own weights, `search/` runs
hyperparameter search. Open `step` first.
"""
