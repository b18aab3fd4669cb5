"""Read text files of an untrusted model folder within size limits, and run libraries on it within a time limit."""

import json
import reprlib
import resource
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.durable import read_regular
from pipeline.errors import CannotTrain

#: Lists of tokens or tensors, which may be large.
_LISTS = ("tokenizer.json", "vocab.*", "merges.txt", "*.tiktoken", "*.model", "*.safetensors.index.json")
_LIST_BYTES = 64 << 20
_TEXT_BYTES = 4 << 20
#: Most values of a JSON file, several times those of the largest model's index; each takes a hundred bytes of memory.
_MOST_VALUES = 1 << 18
_MOST_FILES = 10_000
_TEXTS = ("*.json", "*.jinja", "*.txt", "*.tiktoken", "*.model")
#: Folder in the Hub's cache that the links in its model folders lead to.
_HUB_CACHE = "blobs"
_FAR = 1 << 24
_LAYERS = 1 << 12
_WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx")
#: Largest allowed sizes by their names in transformers, beyond those of any model.
_MOST = {
    "vocab_size": _FAR,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner"), _FAR),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(_WINDOWS, 1 << 31),
}
#: Most processor time of one use; usually it takes milliseconds, loading a tokenizer some seconds.
SECONDS = 120.0
#: Most memory that a chat template may add to the process, in bytes.
_TEMPLATE_BYTES = 1 << 29
#: The signal that kills a process beyond that limit. No exception is possible: such code may never release the
#: interpreter.
ENDED_BY = signal.SIGPROF


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. Raises `OSError` if not a regular file or above 4 MB (lists of tokens, indexes: 64 MB)."""
    return read_regular(path, _most(path))


def try_read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; `None` if `read_bytes` raises an error or the file holds no JSON object."""
    try:
        value = parse_json(read_bytes(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def parse_json(data: bytes, most: int = _MOST_VALUES) -> Any:
    """Return a JSON text's value. Raises `ValueError` if invalid, too deep, or of over `most` commas and brackets."""
    if sum(map(data.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"it has more than {most:,} values")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def unfit_file(folder: Path) -> str:
    """Return why a model folder must not be opened (pipe, link out of it, large text, too many files); "" if it may."""
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
        home = path.resolve().parent
        if is_text(path) and home != path.parent.resolve() and home.name != _HUB_CACHE:
            return f"holds {name}, a link out of the folder"
        if is_text(path) and info.st_size > _most(path):
            return f"has a {name} of {info.st_size:,} bytes, and the limit is {_most(path):,}"
    return ""


def is_text(path: Path) -> bool:
    """Return whether a file is, by its name, a config, a chat template, or a part of a tokenizer."""
    return any(fnmatch(path.name, pattern) for pattern in _TEXTS)


def _most(path: Path) -> int:
    return _LIST_BYTES if any(fnmatch(path.name, pattern) for pattern in _LISTS) else _TEXT_BYTES


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config.json: entries of `text_config` override the others."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def read_window(folder: Path) -> int:
    """Return the model's context window in tokens; `sys.maxsize` if config.json names none or cannot be read."""
    part = text_part(try_read_object(folder / "config.json") or {})
    return next((part[name] for name in _WINDOWS if isinstance(part.get(name), int)), sys.maxsize)


def size_problem(config: Mapping[str, Any]) -> str:
    """Return the first invalid size in a parsed config.json, as a sentence, `text_config` included; "" without any."""
    text = config.get("text_config")
    parts = {"": config, "text_config.": text if isinstance(text, dict) else {}}
    return next((problem for prefix, part in parts.items() for problem in _problems(prefix, part)), "")


def too_few_weights(config: Mapping[str, Any], numbers: int) -> str:
    """
    Return why `numbers` weights are too few for a parsed config.json; "" if they are not, or it has no sizes.

    Missing weights would be initialised at random, in any amount. A layer has at least the square of its width.
    """
    part = text_part(config)
    layers, width = part.get("num_hidden_layers"), part.get("hidden_size")
    if not isinstance(layers, int) or not isinstance(width, int) or layers * width * width <= numbers:
        return ""
    return f"num_hidden_layers is {layers:,} and hidden_size {width:,}, and there are only {numbers:,} weights"


def _problems(prefix: str, config: Mapping[str, Any]) -> Iterator[str]:
    for name, most in _MOST.items():
        value = config.get(name)
        # Some architectures have a list with a size per layer; null is the default.
        for size in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
                yield f"{prefix}{name} is {reprlib.repr(size)}, and must be an integer from 1 to {most:,}"
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        yield f"{prefix}num_attention_heads is {heads}, and must be a multiple of num_key_value_heads, {shared}"


@contextmanager
def foreign_code(what: str, hint: str) -> Iterator[None]:
    """
    Convert any error within the block but `MemoryError` to `CannotTrain`, with a message that begins with `what`.

    `CannotTrain` and exits pass unchanged. `ENDED_BY` kills the whole process if it uses more than `SECONDS` of
    processor time in the block.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except (MemoryError, CannotTrain, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' library is no Exception
        raise CannotTrain(f"{what}: {type(error).__name__}: {error}"[:1000], hint) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process allocate half a gigabyte more in the block; raise `ValueError` if that does not suffice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + _TEMPLATE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"it needs more than {_TEMPLATE_BYTES:,} bytes of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
