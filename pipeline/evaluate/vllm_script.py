"""
Generate answers to token sequences with vLLM: `python3 -I vllm_script.py`, with the Python of vLLM's environment.

Standard input and output are an end of a pipe of `multiprocessing`, for JSON texts. The first has the arguments of
`vllm.LLM`; each further one is a batch: a list of requests, each a prompt's tokens and its sampling parameters. To each
there is one reply: null once the model is loaded, then for every request of a batch the generated tokens and the
log-probabilities of the prompt's tokens, null if not requested. vLLM's own output goes to standard error. The process
group is killed once the pipe is closed, as it is when the step is killed. Nothing of Dropforge is imported: it is not
installed there.
"""

import json
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


def main() -> None:
    """Load the model that the first text names and answer every other text; the pipe's end kills the process."""
    pipe, requests = Connection(os.dup(1)), SimpleQueue[Any]()
    threading.Thread(target=_read, args=(pipe, requests), daemon=True).start()
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - it may print to standard output

    model: Any = LLM(**requests.get())
    pipe.send_bytes(b"null")
    while True:
        prompts, sampling = zip(*requests.get(), strict=True)
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=0, detokenize=False, **parameters) for parameters in sampling],
            use_tqdm=False,
        )
        pipe.send_bytes(json.dumps([_reply(output) for output in outputs]).encode())


def _read(pipe: "Connection", requests: "SimpleQueue[Any]") -> None:
    with suppress(EOFError, OSError):
        while True:
            requests.put(json.loads(pipe.recv_bytes()))
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
