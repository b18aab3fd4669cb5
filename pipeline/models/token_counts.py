"""
Count a text's tokens with a base model's tokenizer.json, without loading the training stack.

A tokenizer takes a gigabyte of memory and seconds for a text of some megabytes. So texts that certainly exceed the
window are recognised first, by characters and words: no token has more of them than the longest token in the
vocabulary.
"""

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.models.untrusted import foreign_code, read_window

_NAME = "tokenizer.json"
#: Most characters that a Unicode normal form composes into one.
_COMPOSED = 4
#: How tokenizers write a space and a line feed.
_BLANKS = str.maketrans("ĠĊ▁", "   ")


class Window:
    """The most tokens of a row, prompt and answer together, and the tokenizer for comparing texts with it."""

    def __init__(self, base: Path, most: int) -> None:
        """Use the smaller of `most` and the window of the base model in a folder."""
        self.limit = read_window(base)
        """The window of the base model."""
        self.tokens = min(most, self.limit)
        self._path = base / _NAME

    @property
    def counts(self) -> bool:
        """Whether tokens can be counted, that is, whether there is a tokenizer.json."""
        return self._path.is_file()

    def is_exceeded(self, *texts: str) -> bool:
        """Return whether the texts together certainly exceed the window; if false, they may still exceed it."""
        if sum(map(len, texts)) <= self.tokens or not self.counts:
            return False
        words = [word for text in texts for word in text.split()]
        characters_a_token, words_a_token = self._longest
        return max(sum(map(len, words)) / characters_a_token, len(words) / words_a_token) > self.tokens

    def count(self, text: str) -> int:
        """
        Return a text's number of tokens, no special ones added; its UTF-8 bytes if there is no tokenizer.json.

        The first call loads the tokenizer, and raises `CannotTrain` if it cannot be read.
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
