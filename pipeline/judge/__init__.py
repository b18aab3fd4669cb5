"""
Have an LLM judge which of two answers is better (optional).

In: the answers of candidate and champion. Out: a win, loss or tie per record, which the gate reads. `client` sends
requests, `prompt` writes prompts and parses replies, `step` judges all records. Open `step` first.
"""
