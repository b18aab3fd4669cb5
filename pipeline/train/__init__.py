"""
Training an adapter, or weights of the base itself.

In: a base model's folder, rows, settings. Out: what was trained, loss curves, checkpoints to go on from. `tokenise` has
tokens of rows, `fit` trains, `method` turns settings into PEFT's and the trainer's, `row_order` says which rows make an
optimizer step, the folder passes computes it, `watcher` measures the dev loss and ends what went wrong, `checkpoints`
keeps and finds what an interrupted training goes on from, `memory` what fits. In data_parallel several processes share
one training, full_weights trains the base itself, in search a step trains several times. Open `fit` first.
"""
