r"""
Recognise plain rows, which are good records and make up most files, by a line's bytes, without parsing.

A plain row has only known keys, each once, and texts of harmless characters. Every line that is not certainly plain is
parsed strictly and checked by every rule, so that this module affects speed only: a property test shows that it never
takes a row with a finding or a warning.
"""

import json
import re
from collections.abc import Collection

from pipeline.models.tokenizer_files import token_pattern

KEYS = ("instruction", "input", "output")
REQUIRED = ("instruction", "output")
MOST_KEYS = 1000
_BLANKS = rb"[ \t]*+"
#: An escape of one character, or both halves of one beyond the first 65,536. Not plain, though it may be good: ASCII in
#: escapes.
_ESCAPE = rb"u(?:(?!00[0-7]|[dD][89a-fA-F])[0-9a-fA-F]{4}|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
_NO_SPACE = rb"(?!\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
#: A first character that is no blank, so that the text is not blank.
_FIRST = rb'[!#-\[\]-~]|\\["\\]|' + _NO_SPACE + rb"[\xc2-\xf4]"
_FIRST_ESCAPED = rb"|\\(?!u0085|u00[aA]0|u1680|u20[025]|u3000)" + _ESCAPE


class PlainRows:
    """Recognises plain rows by their bytes."""

    def __init__(self, special_tokens: Collection[str]) -> None:
        """Compile the patterns; a text that holds one of `special_tokens` is not plain."""
        spelled = token_pattern([json.dumps(token, ensure_ascii=False)[1:-1] for token in special_tokens]).encode()
        # A token beyond ASCII could be spelled with escapes in part: then no line with such an escape is plain.
        escapes = all(token.isascii() for token in special_tokens)
        self._row = re.compile(_row(escapes=escapes) + rb"\n?").fullmatch
        self._suspect = re.compile(spelled).search if spelled else None

    def take(self, line: bytes) -> bool:
        """Return whether `line` is certainly a record without findings and warnings; `False` if only parsing tells."""
        if self._row(line) is None or (self._suspect is not None and self._suspect(line) is not None):
            return False
        try:
            return line.isascii() or bool(line.decode())
        except UnicodeDecodeError:
            return False


def _row(*, escapes: bool) -> bytes:
    """Return the pattern of a plain row: the known keys in any order, each at most once, a group only after them."""
    escaped = rb'\\(?:["\\nrt]|' + _ESCAPE + rb")" if escapes else rb'\\["\\nrt]'
    # All but quotes, backslashes and control characters; a positive set is searched twice as fast.
    run = rb"[ !#-\[\]-\xff]*+"
    first = rb"(?:" + _FIRST + (_FIRST_ESCAPED if escapes else b"") + rb")"
    text = rb'"' + first + run + rb"(?:" + escaped + run + rb')*+"'
    optional = rb'(?:""|' + text + rb")"
    texts = {key: text if key in REQUIRED else optional for key in KEYS}

    def pairs(seen: tuple[str, ...]) -> bytes:
        return rb"(?:" + rb"|".join(pair(key, (*seen, key)) for key in KEYS if key not in seen) + rb")"

    def head(key: str) -> bytes:
        return rb'"' + key.encode() + rb'"' + _BLANKS + rb":" + _BLANKS

    last = rb"(?:," + _BLANKS + head("group") + optional + _BLANKS + rb")?+\}"

    def pair(key: str, seen: tuple[str, ...]) -> bytes:
        ways = [last] if set(REQUIRED) <= set(seen) else []
        if len(seen) < len(KEYS):
            ways.append(rb"," + _BLANKS + pairs(seen))
        return head(key) + texts[key] + _BLANKS + rb"(?:" + rb"|".join(ways) + rb")"

    return _BLANKS + rb"\{" + _BLANKS + pairs(()) + rb"[ \t\r]*+"
