"""
Text → the hashes of its words, 32 bits each: what near-duplicates are found by.

The words are those of `pipeline.metrics.tokens.tokens` (a character each in scripts without spaces), only faster: a
piece between blanks is looked at once, as no word reaches over a blank.
"""

import re
import unicodedata
import zlib

from pipeline.metrics.tokens import tokens

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_MOST_KNOWN = 1 << 18
_LONGEST_KNOWN = 64


class _Words(dict[str, int]):
    """Hashes of words that were seen."""

    def __missing__(self, word: str) -> int:
        """Hash a word; forget all of them rather than grow without bounds."""
        if len(self) >= _MOST_KNOWN:
            self.clear()
        value = zlib.crc32(word.encode("utf-8"))
        if len(word) <= _LONGEST_KNOWN:
            self[word] = value
        return value


class WordHasher:
    """Hashes words; remembers, within bounds, those that it has seen."""

    def __init__(self) -> None:
        """Begin with nothing known."""
        self._words = _Words()
        self._pieces: dict[str, list[int]] = {}

    def hashes(self, text: str) -> list[int]:
        """Return the hash of each word of `text` in order: CRC-32 of its UTF-8."""
        if text.isascii():
            return [self._words[word] for word in _ASCII_WORD.findall(text.lower())]
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        found: list[int] = []
        for piece in folded.split():
            found += self._piece(piece)
        return found

    def _piece(self, piece: str) -> list[int]:
        known = self._pieces.get(piece)
        if known is None:
            known = [self._words[word] for word in tokens(piece)]
            if len(self._pieces) >= _MOST_KNOWN:
                self._pieces.clear()
            if len(piece) <= _LONGEST_KNOWN:
                self._pieces[piece] = known
        return known
