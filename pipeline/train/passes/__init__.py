"""
What happens in a forward and backward pass.

In: the records of an optimizer step. Out: their loss, and gradients on what is trained. `packing` divides a step into
passes, `packed_attention` keeps the records of one apart, `lora_linear` computes a layer with LoRA, `answer_loss` the
loss where there is a label. Open `packing` first.
"""
