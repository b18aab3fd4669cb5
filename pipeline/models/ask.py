"""
Answers one prompt as in an evaluation, and says so while it does: python -m pipeline.models.ask < REQUEST.

The request is an `Ask` as JSON. For each model a line of JSON {"folder": PATH} on standard output, then {"text": PART}
for each part of its answer, then {"tokens": N, "ended": whether it ended by itself}; last, if something is wrong,
{"error": WORDS, "hint": WORDS}. A process of its own, for callers that must never load the training stack.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import Frozen
from pipeline.errors import EXIT_FAILED, DropforgeError
from pipeline.models.generation import Decoding, close_model, open_model
from pipeline.models.greedy_decoding import answer_aloud
from pipeline.models.loading import chosen_device, load_tokenizer
from pipeline.models.prompt import choose_format, fold, prompt_ids

#: What a decoder writes for a character of which it has not all bytes yet.
_UNFINISHED = "\ufffd"


class Model(Frozen):
    """A model to ask, and the format in which it is asked: `auto` is its own chat template where it has one."""

    folder: str
    format: Literal["auto", "chat", "alpaca"] = "auto"


class Ask(Frozen):
    """One request to one or more models, one after the other."""

    models: tuple[Model, ...]
    instruction: str
    input: str = ""
    max_new_tokens: int
    repetition_penalty: float


def answer(request: Ask, model: Model) -> None:
    """Load one model, print its answer part by part, and free its memory."""
    folder, device = Path(model.folder), chosen_device()
    _say(folder=model.folder)
    tokenizer: Any = load_tokenizer(folder)
    fmt = choose_format(model.format, has_chat_template=bool(tokenizer.chat_template))
    prompt = prompt_ids(tokenizer, fmt, fold(request.instruction, request.input))
    asked = open_model(folder, tokenizer, device)
    said = ""

    def tell(text: str) -> None:
        nonlocal said
        whole = text.rstrip(_UNFINISHED)
        if len(whole) > len(said) and whole.startswith(said):
            _say(text=whole[len(said) :])
            said = whole

    found = answer_aloud(asked, prompt, Decoding(request.max_new_tokens, request.repetition_penalty, 1), tell)
    if found.text != said:
        _say(text=found.text.removeprefix(said))
    _say(tokens=found.tokens, ended=found.ended)
    close_model(asked)


def main() -> int:
    """Answer the request on standard input; return the exit code."""
    try:
        request = Ask.model_validate_json(sys.stdin.buffer.read())
        for model in request.models:
            answer(request, model)
    except DropforgeError as error:
        _say(error=error.message, hint=error.hint)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - a library's own words are better than none
        _say(error=f"{type(error).__name__}: {error}"[:500], hint="see whether a server loads the folder")
        return EXIT_FAILED
    return 0


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.exit(main())
