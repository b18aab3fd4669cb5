"""
Training an adapter.

In: a base model's folder, tokenised rows, settings. Out: the adapter, its loss curves, checkpoints to go on from. `fit`
trains, `row_order` says which rows make an optimizer step, `packing` divides it into forward passes,
`packed_attention` keeps records apart in one, `answer_loss` computes the loss, `checkpoints` keeps and finds what an
interrupted training goes on from. Open `fit` first.
"""
