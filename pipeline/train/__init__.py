"""
Train an adapter, or the base model's own weights.

In: a base model's folder, rows, settings. Out: an adapter or weights, loss curves, checkpoints to resume from.
`step` tokenises the rows, `memory` plans memory, and a `job` has all that a training needs before anything is loaded.
`training` runs it, in a process per GPU; `trainer` prepares the model and trains it. `packing` divides optimizer steps
into micro-batches, `answer_loss` computes their loss, `data_parallel` sums gradients. `trained_weights`, with `galore`,
choose what is trained. `watcher` measures the dev loss, stops a diverged training and saves checkpoints,
which `checkpoints` writes and finds. `search` runs hyperparameter search. Open `step` first, then `trainer`.
"""
