"""
What answers: the training stack in the step itself, or vLLM beside it.

In: a model's folder and tokens. Out: answers and likelihoods. `engine` says what every engine can do, `in_step` asks
transformers, `vllm` asks vLLM, which `vllm_server` starts and stops; `process_guard` leaves nothing of it behind.
Open `engine` first.
"""
