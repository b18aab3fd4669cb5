"""
`python -m pipeline.qlora.gguf SOURCE.gguf TARGET`: a GGUF file becomes a plain transformers folder in bf16.

The folder can then be a base model. It appears whole or not at all: it is written aside, synced and renamed.
"""

import shutil
import sys
import uuid
from pathlib import Path

from pipeline import durable
from pipeline.errors import EXIT_OK, CannotTrain, DropforgeError
from pipeline.qlora.loading import quiet

_USAGE = 2


def convert(source: Path, target: Path) -> None:
    """
    Write the model in the GGUF file `source` to the new folder `target`: bf16 weights, tokenizer, chat template.

    Does nothing if `target` is there already. Raises `CannotTrain` if `source` is no GGUF file of a known architecture.
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet()
    if not source.is_file():
        message = f"there is no file {source}"
        raise CannotTrain(message, "name a .gguf file")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        message = f"{source} cannot be read as GGUF: {error}"
        raise CannotTrain(message, "use a .gguf file of an architecture that transformers knows") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


def main(argv: list[str]) -> int:
    """Convert as `argv` says; return the exit code."""
    if len(argv) != 2:  # noqa: PLR2004 - source and target
        print("usage: python -m pipeline.qlora.gguf SOURCE.gguf TARGET_FOLDER", file=sys.stderr)
        return _USAGE
    try:
        convert(Path(argv[0]), Path(argv[1]))
    except DropforgeError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
