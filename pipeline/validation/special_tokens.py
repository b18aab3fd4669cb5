"""
The special tokens of a model folder's tokenizer, read as plain JSON: nothing of the training stack is loaded.

In data they could end or forge a turn. (What training and evaluation do with them: `prompt`.)
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from pipeline.model_folder.text_files import read_text, try_read_object

#: The files of a model folder that name them.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_ADDED = '"added_tokens":'


def special_tokens(folder: Path) -> tuple[str, ...]:
    """
    Return the texts that the tokenizer in `folder` reads as special tokens, sorted.

    A file that is not there or cannot be read gives none: what is wrong with a base model is told elsewhere.
    """
    return _read(tuple(_signature(folder / name) for name in FILES))


def token_pattern(tokens: Collection[str]) -> str:
    """
    Return a regular expression for any of `tokens`, the longest where several begin at one place.

    Parted by their beginnings: tried one after another, a base's hundreds of tokens would all be tried at every `<`.
    """
    ends = "" in tokens
    branches = []
    for _, group in groupby(sorted(set(tokens) - {""}), key=lambda token: token[0]):
        alike = list(group)
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(alike[0], alike[-1], strict=False))
        start = "".join(char for char, _ in pairs)
        branches.append(re.escape(start) + token_pattern([token[len(start) :] for token in alike]))
    if len(branches) == 1 and not ends:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + "?" * ends if branches else ""


def _signature(path: Path) -> tuple[Path, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return path, 0, 0
    return path, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=16)
def _read(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, ...]:
    tokenizer, *configs = (path for path, _size, _time in files)
    found = set(_special(_added_tokens(tokenizer)))
    for path in configs:
        found.update(_named(try_read_object(path) or {}))
    return tuple(sorted(found - {""}))


def _added_tokens(path: Path) -> Any:
    """Return the list in tokenizer.json without reading the vocabulary behind it, which takes many times its size."""
    try:
        text = read_text(path)
        start = text.find(_ADDED)
        if 0 <= start < text.find('"model":'):
            begins = start + len(_ADDED)
            while text[begins : begins + 1].isspace():
                begins += 1
            return json.JSONDecoder().raw_decode(text, begins)[0]
        whole = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return whole.get("added_tokens") if isinstance(whole, dict) else None


def _special(tokens: Any) -> Iterator[str]:
    values: Iterable[Any] = tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()
    for token in values:
        if isinstance(token, dict) and token.get("special") is True:
            yield from _text(token)


def _named(config: dict[str, Any]) -> Iterator[str]:
    """Yield the tokens that a configuration gives a role, and its added ones that it calls special."""
    yield from _special(config.get("added_tokens_decoder"))
    for name in _NAMES:
        yield from _text(config.get(name))
    for name in _LISTS:
        value = config.get(name)
        values: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for token in values:
            yield from _text(token)


def _text(token: Any) -> Iterator[str]:
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str):
        yield text
