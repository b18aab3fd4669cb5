"""
Parse JSON strictly: a duplicate key, NaN, a number too large or a lone surrogate is an error with a rule's name.

A file that is one array is read element by element: memory is bounded by the longest element.
"""

import json
import math
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, TextIO

from pipeline.words import printable

_SHOWN_KEY = 40
#: Deepest nesting of arrays and objects. Counted here, since the limit of `json` differs between Python versions.
MOST_DEPTH = 500
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
#: The change of depth at each bracket, as a signed byte.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
#: The message of `json` for text after the value.
_MORE = "Extra data"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
#: A text that ends inside a word, a number or an escape breaks at most this far from its end.
_CUT_SHORT = 16
_MEND = "mend it there; a broken array cannot be read any further"
#: Finds where a value ends, and no more: a number may have any length.
_scan = json.JSONDecoder(parse_int=float).raw_decode


class BadJson(ValueError):
    """The text is not JSON that a drop may hold; `rule` names the broken rule."""

    def __init__(self, rule: str, message: str, remedy: str, field: str | None = None) -> None:
        """Store message and remedy; `field` is the affected key of an object, if there is one."""
        super().__init__(message)
        self.rule = rule
        self.message = message
        self.remedy = remedy
        self.field = field


def parse(line: bytes) -> Any:
    """Parse a line of UTF-8 as one JSON value and return it. Raises `BadJson`."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        remedy = "save the file as UTF-8, as with: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        raise BadJson("encoding", message, remedy) from None
    if _is_nested(text):
        raise _nested()
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadJson("json", f"{_not_json(error)} at column {error.pos + 1}", _remedy(error, text)) from None
    except BadJson:
        raise
    except ValueError:
        raise BadJson("number", "a number has more digits than Python reads", "write it as a text in quotes") from None
    if _SURROGATE_ESCAPE.search(text) and _has_half(value):
        items = value.items() if isinstance(value, dict) else ()
        raise BadJson(
            "surrogate",
            "a \\ud800 to \\udfff escape stands alone: half a character",
            "write the character itself in UTF-8, or both halves of its escape",
            next((key for key, part in items if isinstance(part, str) and _has_half(part)), None),
        )
    return value


def _not_json(error: json.JSONDecodeError) -> str:
    words = "more follows the end of the value" if error.msg == _MORE else error.msg.removesuffix(" starting at")
    return f"not JSON: {words[:1].lower()}{words[1:]}"


def _nested() -> BadJson:
    return BadJson("nesting", "nested too deeply", "a record is one object with three texts: flatten it")


def _remedy(error: json.JSONDecodeError, text: str) -> str:
    if "\0" in text:
        return "the line holds NUL bytes: the file was probably copied incompletely; drop it again"
    if error.msg == _MORE and text.startswith("{", error.pos):
        return "put a line break between two records"
    if text.strip() in {"{", "}"} or text.startswith(("  ", "\t")):
        return "write each record on one line, as with: jq -c . FILE > NEW.jsonl"
    return "write one complete JSON object on the line"


def _is_nested(text: str) -> bool:
    """Return whether `text` is nested more deeply than `MOST_DEPTH`."""
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return False
    steps = _STRING.sub("", text).encode().translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0) > MOST_DEPTH


def _has_half(value: Any) -> bool:
    return _SURROGATE.search(json.dumps(value, ensure_ascii=False)) is not None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        message = f"the key {printable(twice[:_SHOWN_KEY])!r} stands twice in one object"
        raise BadJson("duplicate_key", message, "keep one of the two")
    return value


def _constant(name: str) -> None:
    raise BadJson("number", f"{name} is not JSON", "write a number, or null, or leave the key out")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJson("number", f"the number {text[:_SHOWN_KEY]} is too large", "write it as a text in quotes")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


class ArrayReader:
    """Reads a JSON array element by element, from a file's current position."""

    def __init__(self, file: TextIO, most: int) -> None:
        """Limit an element to about `most` bytes; `file` must decode invalid UTF-8 by surrogateescape."""
        self._file = file
        self._most = most
        self._text = ""
        self._at = 0
        self._end = False
        self._number = 0
        self._inside = False
        #: Line of the current element, or of the error.
        self.line = 1

    @property
    def record(self) -> int | None:
        """Number of the current element, from 1; `None` between two elements."""
        return self._number if self._inside else None

    def elements(self) -> Iterator[bytes]:
        """Yield the bytes of each element, unparsed. Raises `BadJson` if the array is broken; reading ends there."""
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
        """Return the index after the current element, reading more of the file as needed. Raises `BadJson`."""
        while True:
            try:
                end = _scan(self._text, self._at)[1]
                if self._end or end + _CUT_SHORT < len(self._text):
                    return end
            except RecursionError:
                raise _nested() from None
            except json.JSONDecodeError as error:
                if self._end or not ("Unterminated" in error.msg or error.pos + _CUT_SHORT > len(self._text)):
                    words = f"{_not_json(error)} at character {error.pos - self._at + 1:,} of the element"
                    self._advance(error.pos)
                    raise BadJson("array", words, _MEND) from None
            if len(self._text) - self._at > self._most + _CUT_SHORT:
                raise too_long("the element", self._most)
            self._more()

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _more(self) -> bool:
        """Read the next chunk, drop the text before the current position, and return whether there was more."""
        read = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + read, 0
        self._end = not read
        return bool(read)


def too_long(what: str, most: int) -> BadJson:
    """Return the error for a line or an element (`what`) of more than `most` bytes."""
    remedy = "write one record a line; if it is one record, shorten it"
    return BadJson("too_long", f"{what} is longer than {most:,} bytes", remedy)
