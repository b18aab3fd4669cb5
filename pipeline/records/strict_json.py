"""JSON without the liberties of Python's reader: a duplicate key, NaN or a boundless number is an error with a name."""

import json
import math
import re
from itertools import accumulate
from typing import Any

from pipeline.words import printable

_SHOWN_KEY = 40
#: Most arrays and objects within each other. Counted, since each Python's own reader stops elsewhere.
MOST_DEPTH = 500
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
#: What a bracket does to the depth, as a signed byte.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
#: What `json` says where a value is followed by more.
_MORE = "Extra data"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class BadJson(ValueError):
    """The text is not the JSON that a drop may hold; `rule` names what it broke."""

    def __init__(self, rule: str, message: str, remedy: str, field: str | None = None) -> None:
        """Keep the words; `field` is the key of the object in question, where there is one."""
        super().__init__(message)
        self.rule = rule
        self.message = message
        self.remedy = remedy
        self.field = field


def parse(line: bytes) -> Any:
    """Return the one value that a line is. Raises `BadJson`."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        remedy = "save the file as UTF-8, as with: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        raise BadJson("encoding", message, remedy) from None
    if _is_nested(text):
        raise nested()
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadJson("json", f"{not_json(error)} at column {error.pos + 1}", _remedy(error, text)) from None
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


def not_json(error: json.JSONDecodeError) -> str:
    """Word what `json` found."""
    words = "more follows the end of the value" if error.msg == _MORE else error.msg.removesuffix(" starting at")
    return f"not JSON: {words[:1].lower()}{words[1:]}"


def nested() -> BadJson:
    """Return the error about too many arrays and objects within each other."""
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
    """Say whether `text` is nested more deeply than `MOST_DEPTH`."""
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
