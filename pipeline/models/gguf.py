"""
Convert a GGUF file to a transformers folder in bf16: `python -m pipeline.models.gguf SOURCE.gguf TARGET`.

The folder can then be a base model. It appears whole or not at all: it is written aside, synced and renamed. With
`--check MODEL` instead of a target nothing is kept: the file's logits are compared with those of the model that it was
made from, and a line of JSON gives the difference.
"""

import json
import math
import shutil
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline import durable
from pipeline.errors import EXIT_OK, CannotTrain, DropforgeError
from pipeline.models.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    import torch

#: Positions at the end of each prompt at which the likeliest next tokens are compared.
_POSITIONS = 32
#: The compared prompts; code and other scripts reveal a tokenizer that was not converted.
_PROMPTS = (
    "Write one sentence about the sea.",
    "Sort these numbers: 31, 4, 159, 26.",
    "def add(a, b):\n    return a + b",
    "Wie heißt die Hauptstadt von Österreich? 东京在哪里",
)


def convert(source: Path, target: Path) -> None:
    """
    Convert the GGUF file `source` to the model folder `target` in bf16, with its tokenizer.

    Nothing is done if the folder `target` exists; its parent folders are created. Raises `CannotTrain` if the
    file is missing or cannot be read.
    """
    if target.is_dir():
        return
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(source, aside)
        durable.publish_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(source: Path, folder: Path) -> None:
    model = _read(source, "model")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="5GB")
    _read(source, "tokenizer").save_pretrained(folder)
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    values = json.loads(config.read_bytes())
    rope = dict(values.get("rope_parameters") or {})
    # The names that transformers 4 reads; it would take its defaults for what has only the new names.
    theta = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    scaling = {"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}
    durable.write_json(config, {**values, "torch_dtype": values["dtype"], **theta, **scaling})
    durable.write_json(tokenizer, {**json.loads(tokenizer.read_bytes()), "tokenizer_class": "PreTrainedTokenizerFast"})


def _read(source: Path, what: Literal["model", "tokenizer"]) -> Any:
    """Return the model in a GGUF file in bf16, or its tokenizer. Raises `CannotTrain` if it cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not source.is_file():
        raise CannotTrain(f"there is no file {source}", "name a .gguf file")
    how: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    try:
        if what == "tokenizer":
            return AutoTokenizer.from_pretrained(source.parent, **how)
        dequantised = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(
            source.parent, quantization_config=dequantised, dtype=torch.bfloat16, **how
        )
    except (OSError, ValueError, KeyError) as error:
        message = f"{source} cannot be read as GGUF: {error}"
        raise CannotTrain(message, "use a .gguf file of an architecture that transformers knows") from error


def check(source: Path, model: Path) -> dict[str, float]:
    """
    Return the differences between the logits of the GGUF file `source` and of `model`, from which it was made.

    `distance` is the largest relative L2 distance |converted - model| / |model| over the prompts' next-token logits,
    `top1` the share of the positions at the prompts' ends with the same likeliest next token.
    There are four short prompts. The file is read by transformers, and both models run on the CPU in float32. A copy in
    bfloat16 is written next to `source`, and deleted at the end. Raises `CannotTrain` if one cannot be loaded, their
    tokenizers or chat templates give other tokens for a prompt, or logits are not finite or `model`'s all zero,
    `StepFailed` if memory does not suffice.
    """
    prompts = _tokenised(load_tokenizer(model))
    if _tokenised(_read(source, "tokenizer")) != prompts:
        message = f"{source} tokenises a prompt differently from {model}"
        raise CannotTrain(message, "its tokenizer or chat template was not converted: use another converter")
    with tempfile.TemporaryDirectory(prefix="dropforge-gguf-", dir=source.parent) as aside:
        folder = Path(aside) / "model"
        _write(source, folder)
        pairs = list(zip(_logits(folder, prompts), _logits(model, prompts), strict=True))
    distances = [float((ours[-1] - theirs[-1]).norm() / theirs[-1].norm()) for ours, theirs in pairs]
    if not all(map(math.isfinite, distances)):
        raise CannotTrain(f"the logits of {source} or of {model} are not finite, or all zero", "export another model")
    same = [equal for ours, theirs in pairs for equal in (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).tolist()]
    return {"distance": max(distances), "top1": sum(same) / len(same)}


def _logits(folder: Path, prompts: Sequence[Sequence[int]]) -> "list[torch.Tensor]":
    """Return the logits at each prompt's last 32 tokens or fewer, (tokens, vocabulary), computed in float32."""
    import torch

    model: Any = load_model(folder, "cpu").float()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -_POSITIONS:] for ids in prompts]


def _tokenised(tokenizer: Any) -> list[list[int]]:
    if not tokenizer.chat_template:
        return [tokenizer(text)["input_ids"] for text in _PROMPTS]
    chats = ([{"role": "user", "content": text}] for text in _PROMPTS)
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]


def main(argv: list[str]) -> int:
    """Convert a GGUF file, or print what `check` returns (--check in `argv`), or an error; return the exit code."""
    source, folder = Path(argv[0]), Path(argv[-1])
    try:
        if "--check" in argv:
            print(json.dumps(check(source, folder)))
        else:
            convert(source, folder)
    except DropforgeError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
