"""
Parse JSON strictly: a duplicate key, NaN, a number too large or a lone surrogate is an error with a rule's name.

Of an array the elements are read one after the other, without the whole file in memory.
"""

import json
import math
import re
from collections.abc import Iterator
from io import BufferedReader
from itertools import accumulate
from typing import Any

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
_BLANKS = b" \t\r\n"
#: Bytes of an array that are read at once.
_BLOCK_BYTES = 1 << 16
#: What decides where an element ends; a string that the text ends in has an empty group.
_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[\[\]{},]', re.DOTALL)


class BadJson(ValueError):
    """The text is not JSON that a drop may hold; `rule` names the broken rule."""

    def __init__(self, rule: str, message: str, remedy: str, field: str | None = None, bare: str | None = None) -> None:
        """Store the words, `bare` those without the text that `message` quotes; `field` is the affected key, if any."""
        super().__init__(message)
        self.rule = rule
        self.message = message
        self.remedy = remedy
        self.field = field
        self.bare = bare


def parse(line: bytes) -> Any:
    """
    Parse a line of UTF-8 as one JSON value and return it.

    Raises `BadJson` for anything else, deep nesting, a duplicate key, NaN, a number too large or a lone surrogate.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        remedy = "save the file as UTF-8, as with: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        raise BadJson("encoding", message, remedy) from None
    if _is_nested(text):
        raise BadJson("nesting", "nested too deeply", "a record is one object with three texts: flatten it")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        words = "more follows the end of the value" if error.msg == _MORE else error.msg.removesuffix(" starting at")
        message = f"not JSON: {words[:1].lower()}{words[1:]} at column {error.pos + 1}"
        raise BadJson("json", message, _remedy(error, text)) from None
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


def _remedy(error: json.JSONDecodeError, text: str) -> str:
    if "\0" in text:
        return "the line holds NUL bytes: the file was probably copied incompletely; drop it again"
    if error.msg == _MORE and text.startswith("{", error.pos):
        return "put a line break between two records"
    if text.strip() in {"{", "}"} or text.startswith(("  ", "\t")):
        return "write each record on one line, as with: jq -c . FILE > NEW"
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
        raise BadJson("duplicate_key", message, "keep one of the two", bare="a key stands twice in one object")
    return value


def _constant(name: str) -> None:
    raise BadJson("number", f"{name} is not JSON", "write a number, or null, or leave the key out")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        message, bare = f"the number {text[:_SHOWN_KEY]} is too large", "a number is too large"
        raise BadJson("number", message, "write it as a text in quotes", bare=bare)
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


class BrokenArray(ValueError):
    """The array cannot be read on from `line`, for the reason that the message has."""

    def __init__(self, line: int, message: str) -> None:
        """Store the line, from 1, and the message."""
        super().__init__(message)
        self.line = line


class _Scanner:
    """Finds where elements end in a text that grows."""

    def __init__(self) -> None:
        """Begin behind the bracket that opens the array."""
        self.depth, self.scanned = 1, 0

    def ends(self, held: bytes) -> Iterator[re.Match[bytes]]:
        """Yield each comma behind an element in `held[scanned:]`, and the last bracket; update `depth`, `scanned`."""
        for mark in _MARK.finditer(held, self.scanned):
            self.scanned, sign = mark.end(), mark[0]
            if sign.startswith(b'"'):
                if not mark[1]:  # it goes on in the next block
                    self.scanned = mark.start()
                    return
                continue
            self.depth += (sign in b"[{") - (sign in b"]}")
            if self.depth == 0 or (self.depth == 1 and sign == b","):
                yield mark
            if self.depth == 0:
                return


def elements(file: BufferedReader, most: int) -> Iterator[tuple[int, bytes]]:
    """
    Yield the line, from 1, and the bytes of each element of the array that the rest of `file` is.

    Elements end where quotes, brackets and commas say so; they may be empty or no JSON. Raises `BrokenArray` if an
    element has more than `most` bytes, or if the file ends before the array, or goes on after it.
    """
    block, scan = file.read(_BLOCK_BYTES), _Scanner()
    held = block.partition(b"[")[2]
    line, is_first = 1 + block[: -len(held) or None].count(b"\n"), True
    while True:
        begin = 0
        for mark in scan.ends(held):
            text, begin = held[begin : mark.start()], mark.end()
            element = text.lstrip(_BLANKS)
            at = line + text.count(b"\n", 0, len(text) - len(element))
            if len(element) > most:
                raise BrokenArray(at, f"a row has more than {most:,} bytes")
            if element or mark[0] == b"," or not is_first:
                yield at, element.rstrip(_BLANKS)
            line, is_first = line + text.count(b"\n"), False
        held, scan.scanned = held[begin:], scan.scanned - begin
        if not scan.depth:
            break
        if len(held) > most:
            at = line + held.count(b"\n", 0, len(held) - len(held.lstrip(_BLANKS)))
            raise BrokenArray(at, f"a row has more than {most:,} bytes")
        more = file.read(max(_BLOCK_BYTES, len(held)))
        if not more:
            raise BrokenArray(line, "the file ends before its array does")
        held += more
    while held:
        if held.strip(_BLANKS):
            raise BrokenArray(line, "more follows the end of the array")
        held = file.read(_BLOCK_BYTES)
