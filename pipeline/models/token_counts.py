"""
How many tokens a text has for a base model, by its tokenizer.json; nothing of the training stack is loaded.

A tokenizer takes a gigabyte of memory and seconds for a text of some megabytes. So what certainly does not fit into a
window is told first, by characters and words: no token has more of them than the longest one of the vocabulary.
"""

import json
import re
import sys
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.models.sizes import read_window
from pipeline.models.text_files import read_text
from pipeline.models.untrusted_code import foreign_code
from pipeline.regular_files import signature

_NAME = "tokenizer.json"
#: Characters that Unicode's normal forms make one of, at most.
_COMPOSED = 4
#: How tokenizers write a blank and a line feed.
_BLANKS = str.maketrans("ĠĊ▁", "   ")


class Longest(NamedTuple):
    """The most that one token stands for."""

    characters: int = sys.maxsize
    words: int = sys.maxsize


class Window:
    """The most tokens of a row, prompt and answer together, and texts held against it."""

    def __init__(self, base: Path, most: int) -> None:
        """Take `most`, or the window of the base model in a folder where that is shorter."""
        self.tokens = min(most, read_window(base))
        self._path = base / _NAME

    @property
    def counts(self) -> bool:
        """Whether tokens can be counted; not with a tokenizer that transformers alone knows to read."""
        return self._path.is_file()

    def is_exceeded(self, *texts: str) -> bool:
        """Say whether the texts have more tokens together than fit, whatever the tokenizer makes of them."""
        if sum(map(len, texts)) <= self.tokens:
            return False
        words = [word for text in texts for word in text.split()]
        longest = _longest(signature(self._path))
        return max(sum(map(len, words)) / longest.characters, len(words) / longest.words) > self.tokens

    def count(self, text: str) -> int:
        """Return how many tokens a text has, or, where they cannot be counted, certainly has not more of."""
        return len(self._tokenizer.encode(text, add_special_tokens=False)) if self.counts else len(text.encode())

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # noqa: PLC0415 - where nothing is counted it is not needed

        with foreign_code(f"{self._path} cannot be read", "use another base model"):
            made = Tokenizer.from_file(str(self._path))
        # As its owner last used it.
        made.no_truncation()
        made.no_padding()
        return made


@lru_cache(maxsize=4)
def _longest(file: tuple[str, int, int, int]) -> Longest:
    """Return the most that a token of a tokenizer.json stands for; no bound where it may leave something out."""
    try:
        # The merges behind the vocabulary would take many times its size.
        text = read_text(Path(file[0]))
        begins = re.compile(r'"vocab"\s*:\s*').search(text, text.find('"model"'))
        if begins is None or not re.search(r'"ByteLevel"|"byte_fallback"\s*:\s*true', text[: begins.start()]):
            return Longest()
        vocabulary = json.JSONDecoder().raw_decode(text, begins.end())[0]
        added = re.findall(r'"content"\s*:\s*("(?:[^"\\]|\\.)*+")', text[: begins.start()])
    except (OSError, ValueError, RecursionError):
        return Longest()
    named = vocabulary if isinstance(vocabulary, dict) else [pair[0] for pair in vocabulary]
    tokens = [str(token).translate(_BLANKS) for token in [*named, *map(json.loads, added)]]
    plain = re.search(r'"normalizer"\s*:\s*null', text[: begins.start()])
    characters = max(map(len, tokens), default=0) * (1 if plain else _COMPOSED)
    return Longest(max(1, characters), max([1, *(len(token.split()) for token in tokens)]))
