"""
Micro-batches: how an optimizer step is divided, and the forward and backward pass of each part.

In: the records of an optimizer step. Out: their loss, and gradients on the trained weights. `packing` divides a step
into micro-batches, `packed_attention` attends within each record of one, `lora_linear` computes a LoRA layer,
`answer_loss` the completion-only loss. Open `packing` first.
"""
