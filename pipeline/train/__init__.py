"""
Train an adapter, or the base model's own weights.

In: a base model's folder, rows, settings. Out: an adapter or weights, loss curves, checkpoints to resume from.
`step` tokenises the rows, `training` runs the trainer, in a process per GPU, `trainer` makes it. `packing` orders the
rows and divides optimizer steps into micro-batches, `answer_loss` computes their loss, `data_parallel` sums gradients.
`lora` and `base_weights`, with `galore`, choose what is trained. `watcher` measures the dev loss and stops a diverged
training, `checkpoints` writes and finds checkpoints, `memory` plans memory, `search/` runs hyperparameter search.
Open `step` first.
"""
