"""
Headers of safetensors files, within limits of memory; no weights are read.

What the format allows is for safetensors' own reader to say, when the weights are loaded: it would load numpy, too.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pipeline.models.text_files import parse_json, try_read_object
from pipeline.regular_files import open_regular

#: Of all headers of a model together: what the largest ones have, several times over.
HEADER_BYTES = 32 << 20
#: Of a model, likewise: each takes a kilobyte of memory while its header is read.
MOST_TENSORS = 100_000
_VALUES = 16
"""Brackets and commas of a tensor in a header, and some more."""
_LENGTH_BYTES = 8
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: A file that has less than this share of its bytes on the disk is mostly a hole; file systems that compress save less.
_LEAST_STORED = 1 / 16
_BLOCK_BYTES = 512
_HOLES_FROM = 1 << 30

_Size = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]


class Tensor(BaseModel):
    """What a header says of a tensor; `data_offsets` are where it begins and ends, in bytes after the header."""

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=64)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


Header = dict[str, Tensor]
Shapes = dict[str, list[int]]
_HEADER = TypeAdapter(Header)


class NotSafetensorsError(ValueError):
    """A file is no whole safetensors file; the words say why."""


def read_shapes(path: Path) -> Shapes:
    """Return the shape of each tensor in a safetensors file. Raises what `read_header` raises."""
    return {name: tensor.shape for name, tensor in read_header(path)[0].items()}


def weight_files(folder: Path) -> list[Path]:
    """
    Return the weight files that transformers loads: the whole one, or those that the index names.

    Raises `NotSafetensorsError` if there is neither.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    shards = (try_read_object(folder / INDEX) or {}).get("weight_map")
    if not isinstance(shards, dict):
        raise NotSafetensorsError(f"the folder has neither {WHOLE} nor an index")
    return [folder / Path(str(name)).name for name in sorted(set(shards.values()))]


def read_all_shapes(paths: Iterable[Path]) -> Iterator[tuple[Path, Shapes, int]]:
    """
    Yield, of each weights file of a model, its path, the shape of each tensor, and the length of its header.

    Raises `NotSafetensorsError`, which names the file, as `read_header` does, or if the model has too many tensors.
    """
    left, tensors = HEADER_BYTES, 0
    for path in paths:
        try:
            header, length = read_header(path, left)
        except NotSafetensorsError as error:
            raise NotSafetensorsError(f"{path.name} that is cut off or no safetensors file: {error}") from error
        tensors += len(header)
        if tensors > MOST_TENSORS:
            raise NotSafetensorsError(f"{path.name}: with it there are {tensors:,} tensors, {MOST_TENSORS:,} at most")
        left -= length
        yield path, {name: tensor.shape for name, tensor in header.items()}, length


def read_header(path: Path, most: int = HEADER_BYTES) -> tuple[Header, int]:
    """
    Return what a safetensors file says of its tensors, and how many bytes that takes; the tensors begin 8 bytes later.

    Raises `NotSafetensorsError` if the file does not end where its last tensor does, is mostly a hole, or has a header
    that is none or of more than `most` bytes; `OSError` if it cannot be read.
    """
    with open_regular(path) as file:
        info = os.fstat(file.fileno())
        head = file.read(_LENGTH_BYTES)
        length = int.from_bytes(head, "little")
        size = info.st_size - _LENGTH_BYTES - length
        if len(head) < _LENGTH_BYTES or size < 0:
            raise NotSafetensorsError("it is shorter than its header")
        if length > most:
            raise NotSafetensorsError(f"its header has {length:,} bytes, and {most:,} are left for it")
        text = file.read(length)
    found = text.count(b'"data_offsets"')
    if found > MOST_TENSORS:
        raise NotSafetensorsError(f"it has {found:,} tensors, and {MOST_TENSORS:,} are the most")
    try:
        header = parse_json(text, _VALUES * MOST_TENSORS)
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        header = _HEADER.validate_python(header)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = " of ".join(str(part)[:80] for part in reversed(first["loc"]))
        raise NotSafetensorsError(f"its header is wrong: {where}: {first['msg']}") from error
    except ValueError as error:
        raise NotSafetensorsError("its header is no JSON") from error
    end = max((tensor.data_offsets[1] for tensor in header.values()), default=0)
    if end != size:
        raise NotSafetensorsError(f"its tensors have {end:,} bytes and the file has {size:,} for them")
    stored = info.st_blocks * _BLOCK_BYTES
    # It costs who sends it nothing, and hours to read. Some file systems do not tell the blocks.
    if info.st_size >= _HOLES_FROM and 0 < stored < info.st_size * _LEAST_STORED:
        raise NotSafetensorsError(f"of its {info.st_size:,} bytes only {stored:,} are on the disk")
    return header, length
