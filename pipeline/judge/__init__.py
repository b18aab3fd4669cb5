"""
Have an LLM judge which of two answers is better (optional).

In: the answers of candidate and champion. Out: a win, loss or tie per record, which the gate reads. `client` writes
prompts, sends them and parses replies, `step` judges all records. Open `step` first.
"""
