"""The elements of a file that is one JSON array, each as its text: memory is bounded by the longest element."""

import json
import re
from collections.abc import Iterator
from typing import TextIO

from pipeline.records.strict_json import BadJson, nested, not_json

_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
#: A text that ends inside a word, a number or an escape breaks at most this far from its end.
_CUT_SHORT = 16
_MEND = "mend it there; a broken array cannot be read any further"
#: Finds where a value ends, and no more: a number may have any length.
_scan = json.JSONDecoder(parse_int=float).raw_decode


class ArrayReader:
    """Reads an array from a file's position on."""

    def __init__(self, file: TextIO, most: int) -> None:
        """Read no element that is longer than about `most` bytes; those that are not UTF-8 are escaped in `file`."""
        self._file = file
        self._most = most
        self._text = ""
        self._at = 0
        self._end = False
        self._number = 0
        self._inside = False
        #: Line of the present element, or of what is broken.
        self.line = 1

    @property
    def record(self) -> int | None:
        """Number of the present element, from 1; `None` between two."""
        return self._number if self._inside else None

    def elements(self) -> Iterator[bytes]:
        """Yield each element as it is written. Raises `BadJson` where the array is broken and cannot be read on."""
        self._peek()
        self._advance(self._at + 1)
        more = self._peek() != "]"
        while more:
            self._peek()
            self._number, self._inside = self._number + 1, True
            end = self._find_end()
            yield self._text[self._at : end].encode(errors="surrogateescape")
            self._advance(end)
            self._inside = False
            if more := self._peek() == ",":
                self._advance(self._at + 1)
        if (char := self._peek()) != "]":
            where = "" if char else ", found the end of the file"
            raise BadJson("array", f"not JSON: expecting ',' or ']' after an element{where}", _MEND)
        self._advance(self._at + 1)
        if self._peek():
            raise BadJson("array", "not JSON: more follows the end of the array", _MEND)

    def _peek(self) -> str:
        """Skip blanks and return the next character; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._advance(found.end() if found else self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _find_end(self) -> int:
        """Return the index after the element that begins here, reading on as needed."""
        while True:
            try:
                end = _scan(self._text, self._at)[1]
                if self._end or end + _CUT_SHORT < len(self._text):
                    return end
            except RecursionError:
                raise nested() from None
            except json.JSONDecodeError as error:
                if self._end or not ("Unterminated" in error.msg or error.pos + _CUT_SHORT > len(self._text)):
                    words = f"{not_json(error)} at character {error.pos - self._at + 1:,} of the element"
                    self._advance(error.pos)
                    raise BadJson("array", words, _MEND) from None
            if len(self._text) - self._at > self._most + _CUT_SHORT:
                raise too_long("the element", self._most)
            self._more()

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _more(self) -> bool:
        """Read on, at least as much as is held, and forget what lies behind."""
        read = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + read, 0
        self._end = not read
        return bool(read)


def too_long(what: str, most: int) -> BadJson:
    """Return the error about a line or an element of more than `most` bytes."""
    remedy = "write one record a line; if it is one record, shorten it"
    return BadJson("too_long", f"{what} is longer than {most:,} bytes", remedy)
