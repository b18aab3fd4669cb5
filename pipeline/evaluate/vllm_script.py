"""
Generate answers to token sequences with vLLM: `python3 -I vllm_script.py`, with the Python of vLLM's environment.

Standard input is JSON Lines. The first line has the arguments of `vllm.LLM`; each further line is a batch: a list of
requests, each a prompt's tokens and its sampling parameters. Standard output has one line per line of input: null once
the model is loaded, then for every request of a batch the generated tokens and the log-probabilities of the prompt's
tokens, null if not requested. vLLM's own output goes to standard error. The process group is killed once standard input
closes, as it does when the step is killed. Nothing of Dropforge is imported: it is not installed there.
"""

import json
import os
import signal
import sys
import threading
from queue import SimpleQueue
from typing import Any


def main() -> None:
    """Load the model in standard input's first line and answer every other line; the end of input kills the group."""
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        from vllm import LLM, SamplingParams  # noqa: PLC0415 - it may print to standard output

        model: Any = LLM(**json.loads(lines.get()))
        print("null", file=replies, flush=True)
        while True:
            prompts, sampling = zip(*json.loads(lines.get()), strict=True)
            outputs = model.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [SamplingParams(temperature=0, detokenize=False, **parameters) for parameters in sampling],
                use_tqdm=False,
            )
            print(json.dumps([_reply(output) for output in outputs]), file=replies, flush=True)


def _read(lines: "SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os.killpg(0, signal.SIGKILL)


def _reply(output: Any) -> tuple[list[int], list[float | None] | None]:
    given = output.prompt_logprobs
    # The first token of a prompt has none.
    logprobs = given and [
        chances[token].logprob if chances else None
        for token, chances in zip(output.prompt_token_ids, given, strict=True)
    ]
    return list(output.outputs[0].token_ids), logprobs


if __name__ == "__main__":
    main()
