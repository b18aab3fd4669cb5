"""
The only door to torch, transformers, peft, trl and bitsandbytes.

In: model folders and tokenised rows. Out: what was trained, a merged folder, answers, likelihoods. `training` trains,
`loading` loads, `merging` merges, `generation` answers. Every module imports the stack inside its functions, so
importing one costs nothing. Base models are folders on this machine: the libraries stay off the network and print no
progress bars. README.md says how each is done, and why.
Open `training` first.
"""

import os

# The libraries read these when they are imported, which is later than this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Steps tokenise a few thousand rows in one process; the Rust threads would only quarrel with torch's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
