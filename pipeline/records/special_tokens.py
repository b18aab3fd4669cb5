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

from pipeline.durable import signature
from pipeline.models.untrusted import read_bytes, try_read_object

#: The files of a model folder that name them.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
#: Of special tokens, and of the list of added ones in tokenizer.json; the most of any model are some thousand.
_MOST_TOKENS, _MOST_CHARACTERS, _LISTED_BYTES = 1 << 14, 1 << 18, 4 << 20
#: Most groups within each other in a pattern of tokens.
_DEEPEST = 20


def special_tokens(folder: Path) -> tuple[str, ...]:
    """Return the sorted special tokens of the tokenizer in `folder`; none if `token_problem` says why."""
    return _read(tuple(signature(folder / name) for name in FILES))[0]


def token_problem(folder: Path) -> str:
    """Return why the special tokens of the tokenizer in `folder` cannot be used; empty if they can."""
    return _read(tuple(signature(folder / name) for name in FILES))[1]


def token_pattern(tokens: Collection[str], depth: int = _DEEPEST) -> str:
    """
    Return a regular expression for any of `tokens`, the longest where several begin at one position.

    Grouped by their beginnings: else a base's hundreds of tokens would all be tried at every `<`.
    """
    if not depth:
        return f"(?:{'|'.join(map(re.escape, sorted(set(tokens), key=len, reverse=True)))})"
    ends = "" in tokens
    branches = []
    for _, group in groupby(sorted(set(tokens) - {""}), key=lambda token: token[0]):
        alike = list(group)
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(alike[0], alike[-1], strict=False))
        start = "".join(char for char, _ in pairs)
        branches.append(re.escape(start) + token_pattern([token[len(start) :] for token in alike], depth - 1))
    if len(branches) == 1 and not ends:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + "?" * ends if branches else ""


@lru_cache(maxsize=16)
def _read(files: tuple[tuple[str, int, int, int], ...]) -> tuple[tuple[str, ...], str]:
    """Return the special tokens, and what is wrong with them."""
    tokenizer, *configs = (Path(path) for path, *_ in files)
    try:
        found = set(_special(_added_tokens(tokenizer)))
    except (ValueError, RecursionError):
        return (), f"has a {tokenizer.name} whose added tokens are no JSON of at most {_LISTED_BYTES:,} bytes"
    for path in configs:
        found.update(_named(try_read_object(path) or {}))
    found -= {""}
    if len(found) > _MOST_TOKENS or sum(map(len, found)) > _MOST_CHARACTERS:
        most = f"{_MOST_TOKENS:,} of {_MOST_CHARACTERS:,} characters together are the most"
        return (), f"has {len(found):,} special tokens of {sum(map(len, found)):,} characters, and {most}"
    return tuple(sorted(found)), ""


def _added_tokens(path: Path) -> Any:
    """Return the list in tokenizer.json without reading the vocabulary behind it, which takes many times its size."""
    try:
        data = read_bytes(path)
    except OSError:
        return None
    begins = _ADDED.search(data)
    if begins is None:
        return None
    listed = data[begins.end() : begins.end() + _LISTED_BYTES].decode(errors="ignore")
    return json.JSONDecoder().raw_decode(listed)[0]


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
