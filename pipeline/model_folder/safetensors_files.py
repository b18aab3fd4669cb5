"""Headers of safetensors files, held against what the format allows; no weights are read."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.model_folder.text_files import parse_json
from pipeline.regular_files import open_regular

#: Of all headers of a model together: what the largest ones have, several times over.
HEADER_BYTES = 32 << 20
#: Of a model, likewise: each takes a kilobyte of memory while its header is read.
MOST_TENSORS = 100_000
_VALUES = 16
"""Brackets and commas of a tensor in a header, and some more."""
_LENGTH_BYTES = 8
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
#: A file that has less than this share of its bytes on the disk is mostly a hole; file systems that compress save less.
_LEAST_STORED = 1 / 16
_BLOCK_BYTES = 512
_HOLES_FROM = 1 << 30
_MOST_DIMENSIONS = 64
_LARGEST = 1 << 63

Shapes = dict[str, list[int]]
#: By tensor: its `dtype`, its `shape`, and `data_offsets`, where it begins and ends in bytes after the header.
Header = dict[str, dict[str, Any]]


class NotSafetensorsError(ValueError):
    """A file is no whole safetensors file; the words say why."""


def read_shapes(path: Path, most: int = HEADER_BYTES) -> tuple[Shapes, int]:
    """Return the shape of each tensor in a safetensors file, and the length of its header; see `read_header`."""
    header, length = read_header(path, most)
    return {name: entry["shape"] for name, entry in header.items()}, length


def read_all_shapes(paths: Iterable[Path]) -> Iterator[tuple[Path, Shapes, int]]:
    """
    Yield, of each weights file of a model, its path, the shape of each tensor, and the length of its header.

    Raises `NotSafetensorsError`, which names the file, as `read_header` does, or if the model has too many tensors.
    """
    left, tensors = HEADER_BYTES, 0
    for path in paths:
        try:
            shapes, length = read_shapes(path, left)
            tensors += len(shapes)
            if tensors > MOST_TENSORS:
                raise _wrong(f"with it there are {tensors:,} tensors, and {MOST_TENSORS:,} are the most")
        except NotSafetensorsError as error:
            raise _wrong(f"{path.name} that is cut off or no safetensors file: {error}") from error
        left -= length
        yield path, shapes, length


def read_header(path: Path, most: int = HEADER_BYTES) -> tuple[Header, int]:
    """
    Return what a safetensors file says of its tensors, and how many bytes that takes; the tensors begin 8 bytes later.

    Raises `NotSafetensorsError` if the file is not, byte for byte, what its header says, or has one of more than `most`
    bytes; `OSError` if it cannot be read.
    """
    with open_regular(path) as file:
        info = os.fstat(file.fileno())
        size = info.st_size
        head = file.read(_LENGTH_BYTES)
        length = int.from_bytes(head, "little")
        if len(head) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise _wrong("it is shorter than its header")
        if length > most:
            raise _wrong(f"its header has {length:,} bytes, and {most:,} are left for it")
        text = file.read(length)
    found = text.count(b'"data_offsets"')
    if found > MOST_TENSORS:
        raise _wrong(f"it has {found:,} tensors, and {MOST_TENSORS:,} are the most")
    try:
        header = parse_json(text, _VALUES * MOST_TENSORS)
    except ValueError as error:
        raise _wrong("its header is no JSON") from error
    if not isinstance(header, dict):
        raise _wrong("its header is no JSON object")
    header.pop("__metadata__", None)
    _check_layout(header, size - _LENGTH_BYTES - length)
    _check_stored(info)
    return header, length


def _check_layout(header: dict[str, Any], size: int) -> None:
    """Make sure that the tensors lie side by side and fill the file, each as large as its shape says."""
    spans = sorted((*_span(name, entry), name) for name, entry in header.items())
    end = 0
    for begin, after, name in spans:
        if begin != end:
            raise _wrong(f"tensor {name[:80]} begins at byte {begin}, and the one before ends at {end}")
        end = after
    if end != size:
        raise _wrong(f"its tensors have {end:,} bytes and the file has {size:,} for them")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Return where a tensor begins and ends."""
    try:
        shape, (begin, end), bits = entry["shape"], entry["data_offsets"], _BITS[entry["dtype"]]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong(f"tensor {name[:80]} lacks a known dtype, a shape or its place") from error
    whole = all(type(number) is int and 0 <= number < _LARGEST for number in numbers)
    if not whole or len(shape) > _MOST_DIMENSIONS:
        raise _wrong(f"tensor {name[:80]} has a size that is no whole number from 0 on")
    if math.prod(shape) * bits != (end - begin) * 8:
        raise _wrong(f"tensor {name[:80]} has {end - begin} bytes, which its shape and dtype do not give")
    return begin, end


def _check_stored(info: os.stat_result) -> None:
    """Refuse a file that is mostly a hole: it costs who sends it nothing, and hours to read."""
    stored = info.st_blocks * _BLOCK_BYTES
    # Some file systems do not tell the blocks.
    if info.st_size >= _HOLES_FROM and 0 < stored < info.st_size * _LEAST_STORED:
        raise _wrong(f"of its {info.st_size:,} bytes only {stored:,} are on the disk")


def _wrong(why: str) -> NotSafetensorsError:
    return NotSafetensorsError(why)
