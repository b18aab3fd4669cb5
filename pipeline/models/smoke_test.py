"""
Load a model folder as a server does and generate one token: python -m pipeline.models.smoke_test FOLDER.

Exits with 0, or prints the error and its remedy as one line of JSON and exits with the error's code. It runs in its own
process, for callers that must not load the training stack.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import EXIT_FAILED, DropforgeError, StepFailed
from pipeline.models.loading import chosen_device, load_model, load_tokenizer

_PROMPT = "Hello"


def check(folder: Path) -> str:
    """
    Return the first token that the model in `folder` generates, as text.

    Raises `CannotTrain` if tokenizer or model cannot be loaded, `StepFailed` if its logits are not finite.
    """
    import torch

    device = chosen_device()
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device, offload=True)
    tokens = tokenizer(_PROMPT, return_tensors="pt").to(device)
    with torch.no_grad():
        logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[0, -1].float()
    if not bool(torch.isfinite(logits).all()):
        raise StepFailed("its logits are not finite numbers", "the weights are damaged: use another model")
    return str(tokenizer.decode(int(logits.argmax())))


def main(arguments: Sequence[str]) -> int:
    """Check the folder in `arguments`; return the exit code."""
    try:
        check(Path(arguments[0]))
    except DropforgeError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - a library's message is better than none
        words = {"error": f"{type(error).__name__}: {error}"[:500], "hint": "see whether a server loads the folder"}
        print(json.dumps(words))
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
