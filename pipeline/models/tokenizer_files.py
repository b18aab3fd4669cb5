"""
Read a model folder's tokenizer files without loading the training stack: special tokens, and a text's tokens.

In data, special tokens could end or forge a turn. (What training and evaluation do with them: `template`.)

To count, a tokenizer takes a gigabyte of memory and seconds for a text of some megabytes. So texts that certainly
exceed the window are recognised first, by characters and words: no token has more of them than the longest token in the
vocabulary.
"""

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

from pipeline.durable import signature
from pipeline.models.untrusted import foreign_code, read_bytes, read_window, try_read_object

#: The files of a model folder that name special tokens.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
#: Most special tokens, most characters in all, most bytes of the list of added tokens; models have some thousand.
_MOST_TOKENS, _MOST_CHARACTERS, _LISTED_BYTES = 1 << 14, 1 << 18, 4 << 20
#: Deepest nesting of groups in a pattern of tokens.
_DEEPEST = 20
#: Most characters that a Unicode normal form composes into one.
_COMPOSED = 4
#: How tokenizers write a space and a line feed.
_BLANKS = str.maketrans("ĠĊ▁", "   ")


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
    Return the added tokens in tokenizer.json, `None` if it has none or is unreadable; its vocabulary is not parsed.

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


class Window:
    """The most tokens of a row, prompt and answer together, and the tokenizer for comparing texts with it."""

    def __init__(self, base: Path, most: int) -> None:
        """Use the smaller of `most` and the window of the base model in a folder."""
        self.limit = read_window(base)
        """The window of the base model."""
        self.tokens = min(most, self.limit)
        self._path = base / FILES[0]

    @property
    def counts(self) -> bool:
        """Whether tokens can be counted, that is, whether there is a tokenizer.json."""
        return self._path.is_file()

    def is_exceeded(self, *texts: str) -> bool:
        """Return whether the texts together certainly exceed the window; false is no proof. Raises as `count` does."""
        if sum(map(len, texts)) <= self.tokens or not self.counts:
            return False
        words = [word for text in texts for word in text.split()]
        characters_a_token, words_a_token = self._longest
        return max(sum(map(len, words)) / characters_a_token, len(words) / words_a_token) > self.tokens

    def count(self, text: str) -> int:
        """
        Return a text's number of tokens, no special ones added; its UTF-8 bytes if there is no tokenizer.json.

        The first use loads the tokenizer. Raises `CannotTrain` if it cannot be read.
        """
        return len(self._tokenizer.encode(text, add_special_tokens=False)) if self.counts else len(text.encode())

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # noqa: PLC0415 - needed only for counting

        with foreign_code(f"{self._path} cannot be read", "use another base model"):
            made = Tokenizer.from_file(str(self._path))
        # The file may have these set.
        made.no_truncation()
        made.no_padding()
        return made

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """Return the most characters and words per token; `sys.maxsize` if there is no bound."""
        text = self._tokenizer.to_str()
        settings = text[: text.index('"vocab":', text.index('"model":'))]
        if '"ByteLevel"' not in settings and '"byte_fallback":true' not in settings:
            return sys.maxsize, sys.maxsize
        tokens = [token.translate(_BLANKS) for token in self._tokenizer.get_vocab()]
        characters = max(map(len, tokens), default=0) * (1 if '"normalizer":null' in settings else _COMPOSED)
        return max(1, characters), max([1, *(len(token.split()) for token in tokens)])
