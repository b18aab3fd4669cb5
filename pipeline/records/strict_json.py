"""JSON without the liberties of Python's reader: a duplicate key, NaN or a boundless number is an error with a name."""

import json
import math
import re
from itertools import accumulate
from typing import Any

from pipeline.words import printable

#: Python itself reads no more, by default.
_MAX_DIGITS = 4300
_SHOWN_KEY = 40
_MANY_OBJECTS = 1000
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
#: Most arrays and objects within each other. Counted, since each Python's own reader stops elsewhere.
MOST_DEPTH = 500
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
#: What a bracket does to the depth, as a signed byte.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
NESTED = "nested too deeply"
FLATTEN = "a record is one object with three texts: flatten it"


class BadJson(ValueError):
    """The text is not the JSON that a drop may hold; `rule` names what it broke."""

    def __init__(self, rule: str, message: str, *, remedy: str = "", position: int = -1) -> None:
        """Keep the words; `position` is the index of the offending character, where there is one."""
        super().__init__(message)
        self.rule = rule
        self.message = message
        self.remedy = remedy
        self.position = position


class StrictParser:
    """
    Reads JSON values and remembers what was wrong in the last one.

    The reader's hooks note problems instead of raising, so that a bad element of an array still has an end.
    """

    def __init__(self) -> None:
        """Make a parser; it may be used for many values, by one thread."""
        self._problem: BadJson | None = None
        # Without a call of ours for each of a million integers; it stumbles over one that is too long.
        self._quick = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )
        self._careful = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._integer,
        )

    def parse(self, text: str) -> Any:
        """Return the one value that `text` is. Raises `BadJson` naming the column."""
        stripped = text.lstrip(" \t\r\n")
        offset = len(text) - len(stripped)
        if text.count("{") > _MANY_OBJECTS:
            found = _many_objects(text)
            if found is not None:
                return found[0]
        try:
            value, end = self.scan(text, offset)
        except BadJson as error:
            if error.position < 0:
                raise
            at = f"{error.message} at column {error.position + 1}"
            raise BadJson(error.rule, at, remedy=error.remedy, position=error.position) from None
        rest = text[end:].lstrip(" \t\r\n")
        if rest:
            column = len(text) - len(rest) + 1
            remedy = "put a line break between two records" if rest.startswith("{") else ""
            message = f"not JSON: more follows the end of the value at column {column}"
            raise BadJson("json", message, remedy=remedy, position=column - 1)
        if self._problem is not None:
            raise self._problem
        return value

    def scan(self, text: str, start: int) -> tuple[Any, int]:
        """
        Return the value that begins at `text[start]` and the index after it; see `problem` for what was wrong in it.

        Raises `BadJson` if it has no end: broken, cut short or nested too deeply.
        """
        self._problem = None
        try:
            value, end = self._decode(text, start)
        except json.JSONDecodeError as error:
            if _is_nested(text, start, error.pos):
                raise BadJson("nesting", NESTED, remedy=FLATTEN) from None
            words = error.msg[:1].lower() + error.msg[1:].removesuffix(" starting at")
            raise BadJson("json", f"not JSON: {words}", position=error.pos) from None
        except RecursionError:
            raise BadJson("nesting", NESTED, remedy=FLATTEN) from None
        if _is_nested(text, start, end):
            raise BadJson("nesting", NESTED, remedy=FLATTEN)
        return value, end

    def _decode(self, text: str, start: int) -> tuple[Any, int]:
        try:
            return self._quick.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return self._careful.raw_decode(text, start)

    @property
    def problem(self) -> BadJson | None:
        """What the last value that `scan` returned must not hold."""
        return self._problem

    def _note(self, rule: str, message: str, remedy: str) -> None:
        if self._problem is None:
            self._problem = BadJson(rule, message, remedy=remedy)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            message = f"the key {printable(twice[:_SHOWN_KEY])!r} stands twice in one object"
            self._note("duplicate_key", message, "keep one of the two")
        return value

    def _constant(self, name: str) -> None:
        self._note("number", f"{name} is not JSON", "write a number, or null, or leave the key out")

    def _float(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self._note("number", f"the number {text[:_SHOWN_KEY]} is too large", "write it as a text in quotes")
        return value

    def _integer(self, text: str) -> int:
        if len(text) > _MAX_DIGITS:
            self._note("number", f"a number has {len(text):,} digits", "write it as a text in quotes")
            return 0
        return int(text)


def has_surrogate_escape(text: str) -> bool:
    """Say whether `text` spells a character in halves somewhere, so that one may stand alone."""
    return _SURROGATE_ESCAPE.search(text) is not None


def _is_nested(text: str, start: int, end: int) -> bool:
    """Say whether a part of `text`, which begins outside of strings, is nested more deeply than `MOST_DEPTH`."""
    if text.count("[", start, end) + text.count("{", start, end) <= MOST_DEPTH:
        return False
    steps = _STRING.sub("", text[start:end]).encode().translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0) > MOST_DEPTH


def _many_objects(text: str) -> tuple[Any] | None:
    """
    Return the value that `text` is, if it is certainly strict JSON.

    Without a call of ours for each of a million objects: a key that stood twice would have lost a colon on the way.
    """
    if "\\u003" in text or _is_nested(text, 0, len(text)):
        return None
    try:
        value = json.loads(text)
        colons = json.dumps(value, ensure_ascii=False, allow_nan=False).count(":")
    except (ValueError, RecursionError):
        return None
    return (value,) if colons == text.count(":") else None
