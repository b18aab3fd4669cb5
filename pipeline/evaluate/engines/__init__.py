"""
Engines compute answers and likelihoods: the training stack in the step's process, or a vLLM server.

In: a model's folder and tokens. Out: answers and likelihoods. `engine` has the interface and the engine on
transformers, `vllm` the one on vLLM, whose server `vllm_server` starts and stops; `process_guard` kills all of the
server's processes. Open `engine` first.
"""
