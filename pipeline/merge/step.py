"""
The merge step: an adapter or trained weights, and the model that was trained → the model folder that is served.

A program that reads the base reads the result: config and tokenizer are the base's files, and the weight files have the
base's names and headers. Each tensor is computed in float32, rounded once, and written at the base's offset, with a few
rows in memory at a time.
"""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import TRAINED_FILES, Adapter, Dataset, Model
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, StepFailed
from pipeline.merge.changes import TRAIN_AGAIN, Change, changes
from pipeline.models.generation import load_template
from pipeline.models.manifest import (
    Lineage,
    model_files,
    read_lineage,
    require_start,
    trained_ids,
    write_manifest,
    write_trained_ids,
)
from pipeline.models.safetensors_files import INDEX, WHOLE, Header, read_header, weight_files
from pipeline.models.template import Template
from pipeline.models.untrusted import is_text, parse_json, read_bytes

_PHASES = 2
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Numbers merged at a time: few enough that a block stays in the CPU's cache.
_BLOCK = 1 << 18


def merge(attempt: Attempt) -> Model:
    """
    Merge the adapter, or the trained weights, into the model that the training started from, base or champion.

    The merged model is written to `model/` in the attempt's folder, with a manifest and a list of the records that it
    was trained on, by this run and by those of the champion it started from. Raises `StepFailed` if the adapter's file
    is missing, incomplete or has changed, `CannotTrain` if a merged weight is not finite or cannot be stored in the
    base's files, or the base or the champion's folder has changed, and `Interrupted` if stopped.
    """
    started = time.monotonic()
    adapter, dataset = attempt.load(Adapter), attempt.load(Dataset)
    base, target = Path(attempt.config.base_model), attempt.folder / "model"
    trained = _trained_file(attempt, adapter)
    start = require_start(attempt, adapter.start)
    lineage = None if adapter.start is None else read_lineage(start)
    template = load_template(base, adapter.format)
    attempt.check_stop()
    attempt.progress(0, _PHASES, phase="merge")
    dtype = merge_into(start, trained.parent if adapter.kind == "adapter" else trained, target)
    copy_texts(base, target, template.served)
    generation = _generation(template, attempt.config.evaluate.repetition_penalty)
    durable.write_json(target / "generation_config.json", generation)
    attempt.check_stop()
    attempt.progress(1, _PHASES, phase="hash")
    rows = durable.read_jsonl(attempt.path(dataset.folder) / "train.jsonl")
    # Records that the start was trained on must never count as unseen by this model.
    write_trained_ids(target, chain((row["id"] for row in rows), trained_ids(start)))
    trainings = 1 if lineage is None else lineage.trainings + 1
    identity = write_manifest(target, Lineage(adapter.base_model_id, trainings))
    attempt.progress(_PHASES, _PHASES, phase="hash")
    return Model(
        folder=attempt.relative(target),
        model_id=identity,
        base_model_id=adapter.base_model_id,
        dtype=dtype,
        size_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        format=adapter.format,
        seconds=time.monotonic() - started,
    )


def _trained_file(attempt: Attempt, adapter: Adapter) -> Path:
    """Return the path of the file that the training saved. Raises `StepFailed` if it is missing or has changed."""
    path = attempt.path(adapter.folder) / TRAINED_FILES[adapter.kind]
    if not path.is_file() or durable.sha256_file(path) != adapter.adapter_sha256:
        raise StepFailed(f"{path} is missing or has changed since the training", TRAIN_AGAIN)
    return path


def merge_into(base: Path, trained: Path, target: Path) -> str:
    """
    Write the merged weights to files named as the base's; return their dtypes, sorted, as in `bfloat16, float32`.

    `trained` is as in `changes`; `target` is created. Raises `FileExistsError` if it exists, `CannotTrain` if a merged
    weight is not finite or not stored as float32, float16 or bfloat16, and what `changes` raises.
    """
    headers = {path: read_header(path)[0] for path in weight_files(base)}
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    changed = changes(base, trained, tensors)
    target.mkdir()
    for path, header in headers.items():
        _write_merged(path, header, changed, target / path.name)
    if not (target / WHOLE).exists():
        shutil.copyfile(base / INDEX, target / INDEX)
    return ", ".join(sorted({_DTYPES[tensor.dtype] for tensor in tensors.values() if tensor.dtype in _DTYPES}))


def _generation(template: Template, repetition_penalty: float) -> dict[str, Any]:
    """Return the generation config: greedy as in the evaluation, but without its limit of an answer's length."""
    values = {
        "do_sample": False,
        "repetition_penalty": repetition_penalty,
        "bos_token_id": template.tokenizer.bos_token_id,
        "eos_token_id": list(template.ends),
        "pad_token_id": template.tokenizer.pad_token_id,
    }
    return {name: value for name, value in values.items() if value is not None}


def copy_texts(base: Path, target: Path, template: str | None) -> None:
    """
    Copy the base's config and tokenizer files to the folder `target`; a `template` replaces the base's chat templates.

    The template is written to chat_template.jinja. generation_config.json and the index of the weights are not copied.
    Raises `OSError` if a file is not a regular one, or larger than `read_bytes` allows.
    """
    for path in model_files(base):
        name = path.relative_to(base).as_posix()
        replaced = template is not None and "chat_template" in name
        if not is_text(path) or replaced or name == "generation_config.json" or name.endswith(".index.json"):
            continue
        data = read_bytes(path)
        if template is not None and name == "tokenizer_config.json" and "chat_template" in (config := parse_json(data)):
            # llama.cpp's converter prefers this template to that in chat_template.jinja.
            del config["chat_template"]
            data = json.dumps(config, indent=2).encode()
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)
    if template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_merged(source: Path, header: Header, changed: Mapping[str, Change], target: Path) -> None:
    """
    Copy the safetensors file `source` to `target`, with the same header, changing the weights named in `changed`.

    Raises `CannotTrain` if a number is not finite or a changed weight is not stored as float32, float16 or bfloat16,
    and `OSError` if the file is truncated.
    """
    import torch

    begins = source.stat().st_size - max((tensor.data_offsets[1] for tensor in header.values()), default=0)
    with durable.open_regular(source) as file, target.open("wb", buffering=0) as out:

        def merge_block(name: str, rows: slice) -> None:
            tensor = header[name]
            begin, end = tensor.data_offsets
            row_bytes = (end - begin) // (*tensor.shape, 1)[0]
            offset = begins + begin + rows.start * row_bytes
            block = bytearray((rows.stop - rows.start) * row_bytes)
            if os.preadv(file.fileno(), [block], offset) != len(block):
                raise OSError(f"{source} ends within {name}")
            _write_at(out, _merged(name, tensor.dtype, block, rows, changed.get(name)), offset)

        _write_at(out, file.read(begins), 0)
        # A thread per core over blocks: threads within such small operations would mostly wait for each other.
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(lambda block: merge_block(*block), _blocks(header)):
                pass
        torch.set_num_threads(threads)


def _blocks(header: Header) -> Iterator[tuple[str, slice]]:
    """Yield each tensor's name with some of its rows, until all rows were named; a scalar is one row."""
    for name, tensor in header.items():
        count, width = (*tensor.shape, 1)[0], math.prod(tensor.shape[1:])
        step = max(1, _BLOCK // max(1, width))
        for first in range(0, count if width else 0, step):
            yield name, slice(first, min(first + step, count))


def _merged(name: str, dtype: str, block: bytearray, rows: slice, change: Change | None) -> memoryview:
    """Return the bytes of the weight's `rows`, which are `block` in the base. Raises as `_write_merged` does."""
    import torch

    if change is not None and dtype not in _DTYPES:
        message = f"the trained weight {name} of the base model is stored as {dtype}, not as {', '.join(_DTYPES)}"
        raise CannotTrain(message, "save the base model in bfloat16, and train again")
    kind = getattr(torch, _DTYPES.get(dtype, "uint8"))  # masks and positions are copied
    with torch.inference_mode():
        numbers = torch.frombuffer(block, dtype=kind).view(rows.stop - rows.start, -1)
        if kind.is_floating_point and change is not None:
            numbers = change(numbers, rows).to(kind)
        # Twenty times as fast as `isfinite`; NaN propagates through aminmax.
        if not all(math.isfinite(end) for end in numbers.aminmax()):
            message = f"the merged weight {name} would hold numbers that are not finite"
            raise CannotTrain(message, "lower train.learning_rate and train again")
        return numbers.view(-1).view(torch.uint8).numpy().data


def _write_at(file: FileIO, data: "bytes | memoryview", offset: int) -> None:
    """Write `data` at `offset`. Raises `OSError` if the disk takes only a part: `pwrite` then returns its length."""
    if os.pwrite(file.fileno(), data, offset) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
