"""Read the text files of an untrusted model folder, each up to a size limit."""

import json
import stat
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.durable import read_regular

#: Lists of tokens or tensors, which may be large.
_LISTS = ("tokenizer.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model", "*.safetensors.index.json")
_LIST_BYTES = 64 << 20
_TEXT_BYTES = 4 << 20
#: Most values of a JSON file, several times those of the largest model's index; each takes a hundred bytes of memory.
_MOST_VALUES = 1 << 18
_MOST_FILES = 10_000
_TEXTS = ("*.json", "*.jinja", "*.txt", "*.tiktoken", "*.model")


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. Raises `OSError` if it is not a regular file or too large."""
    return read_regular(path, _most(path))


def read_text(path: Path) -> str:
    """Return a file's text. Raises `OSError` if it is not a regular file or too large, `ValueError` if not UTF-8."""
    return read_bytes(path).decode()


def try_read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; `None` if it cannot be read."""
    try:
        value = parse_json(read_bytes(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def parse_json(data: bytes, most: int = _MOST_VALUES) -> Any:
    """Return the value of a JSON text. Raises `ValueError` if it is invalid, nested too deeply, or too large."""
    if sum(map(data.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"it has more than {most:,} values")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def unfit_file(folder: Path) -> str:
    """Return which file of a model folder must not be opened, and why; empty if there is none."""
    folders = (folder, folder / "additional_chat_templates")
    paths = list(islice((path for part in folders if part.is_dir() for path in part.iterdir()), _MOST_FILES + 1))
    if len(paths) > _MOST_FILES:
        return f"holds more than {_MOST_FILES:,} files"
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        try:
            info = path.stat()
        except FileNotFoundError:
            continue  # a broken link; a missing file is reported where it is needed
        if stat.S_ISDIR(info.st_mode):
            continue
        if not stat.S_ISREG(info.st_mode):
            return f"holds {name}, which is not a regular file"
        if any(fnmatch(name, pattern) for pattern in _TEXTS) and info.st_size > _most(path):
            return f"has a {name} of {info.st_size:,} bytes, and the limit is {_most(path):,}"
    return ""


def _most(path: Path) -> int:
    return _LIST_BYTES if any(fnmatch(path.name, pattern) for pattern in _LISTS) else _TEXT_BYTES
