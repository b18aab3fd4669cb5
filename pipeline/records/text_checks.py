"""What a record's texts must not hold (control characters, the base's special tokens), and what is odd in them."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.records.fast_path import KEYS
from pipeline.records.special_tokens import token_pattern
from pipeline.words import printable

_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f]"
#: UTF-8 that was read as Windows-1252 or Latin-1 (Ã©, Â°, â€™, Ð¿Ñ, ï»¿), and the character for what could not be read.
_MOJIBAKE = (
    "[\u00c2\u00c3][\u0080-\u00bf\u20ac\u0192\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2022\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
    "|(?:[\u00d0\u00d1][\u0080-\u00bf]){2}|\u00e2\u20ac|\u00ef\u00bb\u00bf|\ufffd"
)
#: One set of characters is searched for many times as fast as those alternatives.
_MOJIBAKE_FIRST = "[\u00c2\u00c3\u00d0\u00d1\u00e2\u00ef\ufffd]"
_PLACEHOLDER = re.compile(r"<?no[ _-]?(?:in|out)put>?|n/a", re.IGNORECASE | re.ASCII)
_SHOWN_TOKEN = 60


class TextFault(NamedTuple):
    """What one text of a record must not hold."""

    field: str
    rule: str
    message: str
    remedy: str


class Oddity(NamedTuple):
    """What is odd in a record, though it is no fault: its kind, and the field where one is meant."""

    kind: str
    field: str


#: What each kind of oddity means, and what could be done about it.
ODDITIES: Mapping[str, str] = {
    "mojibake": "{} looks as if its UTF-8 had been read as Windows-1252 (as in Ã©) or could not be read (U+FFFD)",
    "placeholder": "{} is a placeholder such as noinput or N/A, trained on as it stands; for no input, leave it empty",
    "special_token": "{} holds a special token of the base model's tokenizer, which is read as plain text",
}


class TextRules:
    """Holds the texts of records against these rules; made once for a file."""

    def __init__(self, special_tokens: Collection[str], *, escape: bool) -> None:
        """With `escape` a special token in a text is odd, else a fault."""
        self._escape = escape
        tokens = token_pattern(special_tokens)
        self._token = re.compile(tokens) if tokens else None
        self._control = re.compile(_CONTROL)
        self._mojibake = re.compile(_MOJIBAKE)
        self._mojibake_first = re.compile(_MOJIBAKE_FIRST)

    def clean(self, *texts: str) -> bool:
        """Say at once whether there is nothing to say about texts."""
        text = "\n".join(texts)
        if self._control.search(text) is not None or (self._token is not None and self._token.search(text) is not None):
            return False
        if not text.isascii() and self._mojibake_first.search(text) and self._mojibake.search(text):
            return False
        return not any(map(is_placeholder, texts))

    def faults(self, value: Any) -> Iterator[TextFault]:
        """Yield what is wrong with the texts of an object, whatever else is wrong with it; in the order of the keys."""
        for field, text in _texts(value):
            control = self._control.search(text)
            if control is not None:
                what = f"{field} holds the control character U+{ord(control[0]):04X}"
                remedy = "take it out: of these only tab and line breaks are text"
                yield TextFault(field, "control_character", what, remedy)
            token = None if self._escape or self._token is None else self._token.search(text)
            if token is not None:
                name = printable(token[0][:_SHOWN_TOKEN])
                what = f"{field} holds {name}, a special token of the base model's tokenizer"
                remedy = 'take it out, or set intake.special_tokens = "escape" to have it read as plain text'
                yield TextFault(field, "special_token", what, remedy)

    def oddities(self, value: Any) -> Iterator[Oddity]:
        """Yield what is odd in the texts of an object."""
        for field, text in _texts(value):
            if self._mojibake.search(text) is not None:
                yield Oddity("mojibake", field)
            if is_placeholder(text):
                yield Oddity("placeholder", field)
            if self._escape and self._token is not None and self._token.search(text) is not None:
                yield Oddity("special_token", field)


def is_placeholder(text: str) -> bool:
    """Say whether a text stands for the absence of one: noinput, <noinput>, N/A."""
    return len(text) < 40 and _PLACEHOLDER.fullmatch(text.strip()) is not None  # noqa: PLR2004 - cheap before exact


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key in KEYS:
            text = value.get(key)
            if isinstance(text, str):
                yield key, text
