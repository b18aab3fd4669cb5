"""Find faults (control characters, special tokens) and oddities (mojibake, placeholders) in a record's texts."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pipeline.records.fast_path import KEYS
from pipeline.records.special_tokens import token_pattern
from pipeline.words import printable

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
#: UTF-8 that was read as Windows-1252 or Latin-1 (Ã©, Â°, â€™, Ð¿Ñ, ï»¿), and the character for what could not be read.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf\u20ac\u0192\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2022\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
    "|(?:[\u00d0\u00d1][\u0080-\u00bf]){2}|\u00e2\u20ac|\u00ef\u00bb\u00bf|\ufffd"
)
#: A quick test before `_MOJIBAKE`: a set of characters is searched many times as fast as alternatives.
_MOJIBAKE_FIRST = re.compile("[\u00c2\u00c3\u00d0\u00d1\u00e2\u00ef\ufffd]")
_PLACEHOLDER = re.compile(r"<?no[ _-]?(?:in|out)put>?|n/a", re.IGNORECASE | re.ASCII)
_SHOWN_TOKEN = 60


#: The message for each kind of oddity, with the field to be filled in.
ODDITIES: Mapping[str, str] = {
    "mojibake": "{} looks as if its UTF-8 had been read as Windows-1252 (as in Ã©) or could not be read (U+FFFD)",
    "placeholder": "{} is a placeholder such as noinput or N/A, trained on as it is; for no input, leave it empty",
}


class TextRules:
    """Checks the texts of records; one instance serves a whole file."""

    def __init__(self, special_tokens: Collection[str]) -> None:
        """Compile the pattern of `special_tokens`."""
        tokens = token_pattern(special_tokens)
        self._token = re.compile(tokens) if tokens else None

    def clean(self, *texts: str) -> bool:
        """Return whether texts have neither faults nor oddities, faster than the two methods that list them."""
        text = "\n".join(texts)
        if _CONTROL.search(text) is not None or (self._token is not None and self._token.search(text) is not None):
            return False
        if not text.isascii() and _MOJIBAKE_FIRST.search(text) and _MOJIBAKE.search(text):
            return False
        return not any(map(_is_placeholder, texts))

    def faults(self, value: Any) -> Iterator[tuple[str, str, str, str]]:
        """Yield field, rule, message and remedy of each fault in the texts of an object, in the order of the keys."""
        for field, text in _texts(value):
            control = _CONTROL.search(text)
            if control is not None:
                what = f"{field} holds the control character U+{ord(control[0]):04X}"
                yield field, "control_character", what, "take it out: of these only tab and line breaks are text"
            token = None if self._token is None else self._token.search(text)
            if token is not None:
                name = printable(token[0][:_SHOWN_TOKEN])
                what = f"{field} holds {name}, a special token of the base model's tokenizer"
                yield field, "special_token", what, "take it out: it could end or forge a turn of the conversation"

    def oddities(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield the kind and field of each oddity in the texts of an object."""
        for field, text in _texts(value):
            if _MOJIBAKE.search(text) is not None:
                yield "mojibake", field
            if _is_placeholder(text):
                yield "placeholder", field


def _is_placeholder(text: str) -> bool:
    """Return whether a text is a placeholder for an empty one: noinput, <noinput>, N/A."""
    return len(text) < 40 and _PLACEHOLDER.fullmatch(text.strip()) is not None  # noqa: PLR2004 - cheap before exact


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key in KEYS:
            text = value.get(key)
            if isinstance(text, str):
                yield key, text
