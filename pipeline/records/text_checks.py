"""Find control characters and special tokens in a record's texts."""

import re
from collections.abc import Iterator
from typing import Any

from pipeline.records.fast_path import KEYS
from pipeline.words import printable

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SHOWN_TOKEN = 60


def text_faults(value: Any, special: re.Pattern[str] | None) -> Iterator[tuple[str, str, str, str]]:
    """
    Yield (field, rule, message, remedy) for each text of a row with a control character, or a token by `special`.

    Only the first of each kind in a text is named. Values that are no object or no text are skipped.
    """
    texts = [(key, value[key]) for key in KEYS if key in value] if isinstance(value, dict) else []
    for field, text in texts:
        if not isinstance(text, str):
            continue
        control = _CONTROL.search(text)
        if control is not None:
            what = f"{field} holds the control character U+{ord(control[0]):04X}"
            yield field, "control_character", what, "take it out: of these only tab and line breaks are text"
        token = None if special is None else special.search(text)
        if token is not None:
            name = printable(token[0][:_SHOWN_TOKEN])
            what = f"{field} holds {name}, a special token of the base model's tokenizer"
            yield field, "special_token", what, "take it out: it could end or forge a turn of the conversation"
