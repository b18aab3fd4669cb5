"""
Read the headers of untrusted safetensors files within limits of memory, without reading weights.

Whether a file conforms to the format is checked by safetensors' own reader when weights are loaded: it needs numpy.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pipeline.durable import open_regular
from pipeline.models.untrusted import parse_json, try_read_object

#: Most bytes of all headers of a model together, several times those of the largest models.
HEADER_BYTES = 32 << 20
#: Most tensors of a model, likewise: each takes a kilobyte of memory while its header is read.
MOST_TENSORS = 100_000
_VALUES = 16
"""Upper bound of brackets and commas per tensor in a header."""
_LENGTH_BYTES = 8
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: A file with less than this share of its bytes on disk is mostly a hole; compressing file systems save less.
_LEAST_STORED = 1 / 16
_BLOCK_BYTES = 512
_HOLES_FROM = 1 << 30

_Size = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]


class Tensor(BaseModel):
    """A tensor's entry in a header; `data_offsets` are its begin and end, in bytes after the header."""

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=64)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


Header = dict[str, Tensor]
Shapes = dict[str, list[int]]
_HEADER = TypeAdapter(Header)


class NotSafetensorsError(ValueError):
    """A file is not a complete safetensors file; the message says why."""


def weight_files(folder: Path) -> list[Path]:
    """Return [model.safetensors], else the index's shards, missing or not. Raises `NotSafetensorsError` if neither."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    shards = (try_read_object(folder / INDEX) or {}).get("weight_map")
    if not isinstance(shards, dict):
        raise NotSafetensorsError(f"the folder has neither {WHOLE} nor an index")
    return [folder / Path(str(name)).name for name in sorted(set(shards.values()))]


def read_all_shapes(paths: Iterable[Path]) -> Iterator[tuple[Path, Shapes, int]]:
    """
    Yield each weights file's path, the shapes of its tensors by name, and the length of its header in bytes.

    Raises `NotSafetensorsError` naming the file, and `OSError`, where `read_header` does, or if all files together have
    more than 100,000 tensors or 32 MB of headers.
    """
    left, tensors = HEADER_BYTES, 0
    for path in paths:
        try:
            header, length = read_header(path, left)
        except NotSafetensorsError as error:
            raise NotSafetensorsError(f"{path.name} that is truncated or not a safetensors file: {error}") from error
        tensors += len(header)
        if tensors > MOST_TENSORS:
            raise NotSafetensorsError(
                f"{path.name}: with it there are {tensors:,} tensors, and the limit is {MOST_TENSORS:,}"
            )
        left -= length
        yield path, {name: tensor.shape for name, tensor in header.items()}, length


def read_header(path: Path, most: int = HEADER_BYTES) -> tuple[Header, int]:
    """
    Return a safetensors file's header and its length in bytes, not counting the 8 bytes of the length field.

    The header's metadata are left out. Raises `NotSafetensorsError` if the file does not end with its last tensor, is
    mostly a hole, has more than 100,000 tensors, or has an invalid header or one of more than `most` bytes; `OSError`
    if it cannot be read.
    """
    with open_regular(path) as file:
        info = os.fstat(file.fileno())
        head = file.read(_LENGTH_BYTES)
        length = int.from_bytes(head, "little")
        size = info.st_size - _LENGTH_BYTES - length
        if len(head) < _LENGTH_BYTES or size < 0:
            raise NotSafetensorsError("it is shorter than its header")
        if length > most:
            raise NotSafetensorsError(f"its header has {length:,} bytes, and the limit is {most:,}")
        text = file.read(length)
    tensors = text.count(b'"data_offsets"')
    if tensors > MOST_TENSORS:
        raise NotSafetensorsError(f"it has {tensors:,} tensors, and the limit is {MOST_TENSORS:,}")
    try:
        header = parse_json(text, _VALUES * MOST_TENSORS)
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        header = _HEADER.validate_python(header)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = " of ".join(str(part)[:80] for part in reversed(first["loc"]))
        raise NotSafetensorsError(f"its header is invalid: {where}: {first['msg']}") from error
    except ValueError as error:
        raise NotSafetensorsError("its header is not JSON") from error
    end = max((tensor.data_offsets[1] for tensor in header.values()), default=0)
    if end != size:
        raise NotSafetensorsError(f"its tensors have {end:,} bytes and the file has {size:,} for them")
    stored = info.st_blocks * _BLOCK_BYTES
    # A sparse file costs nothing to send and hours to read. Some file systems report no blocks.
    if info.st_size >= _HOLES_FROM and 0 < stored < info.st_size * _LEAST_STORED:
        raise NotSafetensorsError(f"only {stored:,} of its {info.st_size:,} bytes are on disk")
    return header, length
