"""
Read the special tokens of a model folder's tokenizer as plain JSON, without loading the training stack.

In data they could end or forge a turn. (What training and evaluation do with them: `template`.)
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

from pipeline.durable import signature
from pipeline.models.untrusted import read_bytes, try_read_object

#: The files of a model folder that name special tokens.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
#: Most special tokens, most characters in all, most bytes of the list of added tokens; models have some thousand.
_MOST_TOKENS, _MOST_CHARACTERS, _LISTED_BYTES = 1 << 14, 1 << 18, 4 << 20
#: Deepest nesting of groups in a pattern of tokens.
_DEEPEST = 20


def special_tokens(folder: Path) -> tuple[str, ...]:
    """Return the sorted special tokens in the tokenizer files of `folder`; empty if `token_problem` has a reason."""
    return _read(tuple(signature(folder / name) for name in FILES))[0]


def token_problem(folder: Path) -> str:
    """Return why `folder`'s special tokens cannot be used, as "has 20,000 special tokens, ..."; empty if they can."""
    return _read(tuple(signature(folder / name) for name in FILES))[1]


def token_pattern(tokens: Collection[str], depth: int = _DEEPEST) -> str:
    """
    Return a regular expression that matches any of `tokens`, at each position the longest; empty without tokens.

    Alternatives are grouped by common prefixes; else a base's hundreds of tokens would all be tried at every `<`. The
    groups are nested at most `depth` times.
    """
    if not depth:
        return f"(?:{'|'.join(map(re.escape, sorted(set(tokens), key=len, reverse=True)))})"
    ends = "" in tokens
    branches = []
    for _, group in groupby(sorted(set(tokens) - {""}), key=lambda token: token[0]):
        alike = list(group)
        start = commonprefix(alike)
        branches.append(re.escape(start) + token_pattern([token[len(start) :] for token in alike], depth - 1))
    if len(branches) == 1 and not ends:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + "?" * ends if branches else ""


@lru_cache(maxsize=16)
def _read(files: tuple[tuple[str, int, int, int], ...]) -> tuple[tuple[str, ...], str]:
    """Return the sorted special tokens in the tokenizer `files` and "", or none and why they cannot be used."""
    tokenizer, *configs = (Path(path) for path, *_ in files)
    try:
        tokens = set(_special(_added_tokens(tokenizer)))
    except (ValueError, RecursionError):
        return (), f"has a {tokenizer.name} whose added tokens are no JSON of at most {_LISTED_BYTES:,} bytes"
    for path in configs:
        tokens.update(_named(try_read_object(path) or {}))
    tokens -= {""}
    if any("\ud800" <= char <= "\udfff" for token in tokens for char in token):
        return (), "has a special token with half a surrogate pair, which is no character"
    if len(tokens) > _MOST_TOKENS or sum(map(len, tokens)) > _MOST_CHARACTERS:
        most = f"{_MOST_TOKENS:,} of {_MOST_CHARACTERS:,} characters together are the most"
        return (), f"has {len(tokens):,} special tokens of {sum(map(len, tokens)):,} characters, and {most}"
    return tuple(sorted(tokens)), ""


def _added_tokens(path: Path) -> Any:
    """
    Return the added tokens in tokenizer.json, `None` without any; the vocabulary after them is not parsed.

    Raises `ValueError` or `RecursionError` if they are no JSON, or have more than 4 MB.
    """
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
    """Yield a configuration's tokens with a role, such as `eos_token`, and its added tokens marked as special."""
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
