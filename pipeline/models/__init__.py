"""
Check, load and prompt model folders, without trusting their files.

In: a folder, prompts. Out: its model id and manifest, or what is wrong with it; answers and likelihoods. `manifest`
identifies a model by the hashes of its files, `tokenizer_files` reads its tokenizer, `loading` loads it,
`template` writes prompts, `prefill` reads them, `generation` and `greedy_decoding` answer, `gguf` converts, `gpu_check`
tries the GPU. torch and transformers are imported inside functions: the daemon imports this folder without them.
Open `manifest` first, then `loading`.
"""
