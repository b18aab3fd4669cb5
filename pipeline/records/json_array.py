"""The elements of a file that is one JSON array, one at a time: memory is bounded by the longest element."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.records.strict_json import BadJson, StrictParser, has_surrogate_escape

_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
#: A text that ends inside a word, a number or an escape breaks at most this far from its end.
_CUT_SHORT = 16


@dataclass(frozen=True, slots=True)
class Item:
    """One element, or what is wrong with it; `escaped` says that its text holds surrogate escapes."""

    line: int
    record: int | None
    value: Any = None
    error: BadJson | None = None
    escaped: bool = False
    last: bool = False
    """Nothing can be read behind it, though the array may go on."""


def read_array(file: BinaryIO, max_bytes: int) -> Iterator[Item]:
    """
    Yield the elements of the array that `file` holds from its position on, none longer than about `max_bytes`.

    An element that breaks a rule of ours is an item with an error; broken JSON is one too, and the last. Where it is
    the array itself that is broken, the item's `record` is `None`.
    """
    reader = _Reader(file, max_bytes)
    number, inside = 0, False
    try:
        reader.expect("[")
        if reader.peek() == "]":
            reader.expect("]")
        else:
            more = True
            while more:
                number, inside = number + 1, True
                yield reader.element(number)
                inside = False
                more = reader.separator()
        reader.end()
    except BadJson as error:
        line, words = reader.place(error)
        yield Item(line, number if inside else None, error=BadJson(error.rule, words, remedy=error.remedy), last=True)


class _Reader:
    """Text of the file around the present position, read in as it is needed."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = file
        self._max = max_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._parser = StrictParser()
        self._text = ""
        self._at = 0
        self._line = 1
        self._dropped = 0  # characters of the line in which the text begins that were forgotten
        self._eof = False
        self._undecodable: BadJson | None = None  # what stands behind the text that could be decoded

    def peek(self) -> str:
        """Skip blanks and return the next character; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._advance(found.end() if found else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_CHUNK_BYTES):
                return ""

    def expect(self, char: str) -> None:
        if self.peek() != char:
            raise self._broken(f"not JSON: expecting {char!r}")
        self._advance(self._at + 1)

    def separator(self) -> bool:
        """Pass the comma or the bracket after an element; say whether another element follows."""
        char = self.peek()
        if not char or char not in ",]":
            raise self._broken("not JSON: expecting ',' or ']' after an element")
        self._advance(self._at + 1)
        return char == ","

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            raise self._broken("not JSON: more follows the end of the array")

    def element(self, record: int) -> Item:
        """Read the next element; its own faults are in the item. Raises `BadJson` if it has no end."""
        self.peek()
        line, size = self._line, _CHUNK_BYTES
        while True:
            value, end, error = self._try()
            if error is None and (self._eof or self._is_whole(end)):
                break
            if error is not None and (self._eof or not self._cut_short(error)):
                raise error
            if len(self._text) - self._at > self._max:
                raise BadJson("too_long", "")
            self._more(size)
            size *= 2
        raw = self._text[self._at : end]
        self._advance(end)
        if len(raw) > self._max:
            return Item(line, record, error=BadJson("too_long", ""))
        return Item(line, record, value, self._parser.problem, has_surrogate_escape(raw))

    def place(self, error: BadJson) -> tuple[int, str]:
        """Return the line of what `error` is about, and its words with the column."""
        if error.position < 0:
            return self._line, error.message
        line = self._line + self._text.count("\n", self._at, error.position)
        before = self._text.rfind("\n", 0, error.position)
        column = error.position - before if before >= 0 else self._dropped + error.position + 1
        return line, f"{error.message} at column {column}"

    def _is_whole(self, end: int) -> bool:
        """Say whether the value is over at `end`: a number may go on in the next chunk, even after `0.`."""
        return end < len(self._text) - _CUT_SHORT or self._text[end : end + 1] in {",", "]", " ", "\t", "\r", "\n"}

    def _cut_short(self, error: BadJson) -> bool:
        """Say whether the error may come from the end of the text read so far."""
        return "unterminated" in error.message or error.position >= len(self._text) - _CUT_SHORT

    def _try(self) -> tuple[Any, int, BadJson | None]:
        try:
            value, end = self._parser.scan(self._text, self._at)
        except BadJson as error:
            return None, self._at, error
        return value, end, None

    def _broken(self, message: str) -> BadJson:
        words = message if self._at < len(self._text) else f"{message}, found the end of the file"
        return BadJson("json", words, position=self._at)

    def _advance(self, position: int) -> None:
        self._line += self._text.count("\n", self._at, position)
        self._at = position

    def _more(self, size: int) -> bool:
        """Read `size` bytes further, forgetting what lies behind. Raises `BadJson` where they are not UTF-8."""
        if self._undecodable is not None:
            self._undecodable.position = len(self._text)
            raise self._undecodable
        if self._eof:
            return False
        data = self._file.read(size)
        self._eof = not data
        try:
            text = self._decoder.decode(data, final=self._eof)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode("utf-8")
            message = f"not UTF-8: byte 0x{error.object[error.start]:02x}"
            remedy = "save the file as UTF-8, as with: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
            self._undecodable = BadJson("encoding", message, remedy=remedy)
        before = self._text.rfind("\n", 0, self._at)
        self._dropped = self._at - before - 1 if before >= 0 else self._dropped + self._at
        self._text = self._text[self._at :] + text
        self._at = 0
        return bool(data)
