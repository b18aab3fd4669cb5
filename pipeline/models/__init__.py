"""
Model folders: checked without trusting who wrote them, loaded, prompted.

In: a folder, prompts. Out: its identity and manifest, or what is wrong with it; answers and likelihoods. `manifest`
names a model by the hashes of its files, `loading` loads it, `prompt` formats a prompt, `generation` and
`greedy_decoding` answer, `gguf` converts. torch and transformers are imported inside functions: the daemon imports this
folder without them. Open `manifest` first, then `loading`.
"""
