"""
Stream a model's answer to one prompt, or check that a model answers.

`python -m pipeline.models.ask < REQUEST`: the request is an `Ask` as JSON. It prints a line of JSON {"text": PART} for
each part of the answer, then {"tokens": N, "ended": whether the model ended the answer}. `python -m pipeline.models.ask
--check FOLDER` loads a model as a server does and runs one forward pass. On an error the last line is
{"error": MESSAGE, "hint": REMEDY}, and the exit code is the error's. It runs in its own process, for callers that must
not load the training stack.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import Frozen
from pipeline.errors import EXIT_FAILED, EXIT_OK, DropforgeError, StepFailed
from pipeline.models.generation import Decoding, load_template, open_model
from pipeline.models.greedy_decoding import answers
from pipeline.models.loading import chosen_device, load_model, load_tokenizer
from pipeline.models.placement import inference_quantization
from pipeline.models.template import conversation, fold

#: What a decoder emits for a character whose bytes are not complete.
_UNFINISHED = "\ufffd"


class Ask(Frozen):
    """One prompt for the model in `folder`; the format `auto` is the model's chat template if it has one."""

    folder: str
    format: Literal["auto", "chat", "alpaca"] = "auto"
    instruction: str
    input: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and text of the turns before it."""
    max_new_tokens: int
    repetition_penalty: float


def answer(request: Ask) -> None:
    """
    Load the model and print its answer as the module describes, each part as it is generated.

    An answer that loops is cut, with `ended` false. Raises `CannotTrain` if the model cannot be loaded or prompted,
    `StepFailed` if memory does not suffice or torch cannot use the GPU.
    """
    folder = Path(request.folder)
    template = load_template(folder, request.format)
    prompt = template.prompt(conversation(request.turns, fold(request.instruction, request.input)))
    device = chosen_device()
    loaded = open_model(folder, template, device, inference_quantization(device, folder))
    printed = ""

    def tell(_complete: int, tokens: Sequence[Sequence[int]]) -> None:
        nonlocal printed
        complete = template.read(tokens[0]).rstrip(_UNFINISHED)
        if len(complete) > len(printed) and complete.startswith(printed):
            say(text=complete[len(printed) :])
            printed = complete

    (reply,) = answers(loaded, [prompt], Decoding(request.max_new_tokens, request.repetition_penalty, 1), tell)
    if reply.text != printed:
        say(text=reply.text.removeprefix(printed))
    say(tokens=reply.tokens, ended=reply.ended)


def check(folder: Path) -> None:
    """
    Check, by one forward pass on a short text, that the model in `folder` loads and gives finite logits.

    Raises `CannotTrain` if it cannot be loaded, `StepFailed` if memory does not suffice to load it, torch cannot use
    the GPU, or logits are not finite.
    """
    import torch

    device = chosen_device()
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device, inference_quantization(device, folder), spread=True)
    tokens = tokenizer("Hello", return_tensors="pt").to(device)
    with torch.no_grad():
        logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[0, -1].float()
    if not bool(torch.isfinite(logits).all()):
        raise StepFailed("its logits are not finite numbers", "the weights are damaged: use another model")


def run(work: Callable[[], None], hint: str) -> int:
    """Call `work` and return 0; print any exception as JSON, with `hint` if it has none, and return its exit code."""
    try:
        work()
    except DropforgeError as error:
        say(error=error.message, hint=error.hint)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - a library's message is better than none
        say(error=f"{type(error).__name__}: {error}"[:500], hint=hint)
        return EXIT_FAILED
    return EXIT_OK


def say(**fields: Any) -> None:
    """Print `fields` as a line of JSON, and flush it."""
    print(json.dumps(fields), flush=True)


def _work() -> None:
    """Check the model that is named last on the command line or, if none is, answer the `Ask` on standard input."""
    if sys.argv[1:]:
        check(Path(sys.argv[-1]))
    else:
        answer(Ask.model_validate_json(sys.stdin.buffer.read()))


if __name__ == "__main__":
    sys.exit(run(_work, "see whether a server loads the folder"))
