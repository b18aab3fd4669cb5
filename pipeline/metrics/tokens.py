"""Split a text in any script into words."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

#: Scripts that put no spaces between words; there each character is a token.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # CJK radicals
    (0x3005, 0x3007),
    (0x3021, 0x30FF),  # Hiragana, Katakana
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),  # Han, supplementary planes
)
_CHARACTERS_A_WORD = 2
#: Characters in which a script is looked for: a long text is not read to its end.
_MOST_CHARACTERS = 10_000
_UNSPACED_SIGN = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED) + "]")
#: Letters in lower case and digits; a space for all other characters.
_ASCII = bytes(
    ord(chr(code).lower()) if chr(code).isalnum() and chr(code).isascii() else ord(" ") for code in range(256)
)
_LONGEST_CACHED = 64
_SPACE = re.compile(r"\s+")
# Signs with a meaning at an edge (minus, percent, #, currency, @) are not included.
_QUOTES = "\"'`*_ \u2018\u2019\u201a\u201c\u201d\u201e"
_OPENING = _QUOTES + "([{<\u00a1\u00ab\u00bf\u2039\u3008\u300a\u300c\u300e\u3010"
_CLOSING = _QUOTES + ")]}>.,;:!?\u00bb\u060c\u061f\u06d4\u0964\u203a\u3001\u3002\u3009\u300b\u300d\u300f\u3011"


def normalise(text: str) -> str:
    """
    Return `text` normalised for exact match: NFKC, case-folded, single spaces, no punctuation around it.

    Quotes, brackets, emphasis and marks that end a sentence are removed; signs of a value (-5, 50%, .5, C#) are kept.
    Text of only punctuation is kept.
    """
    plain = _SPACE.sub(" ", _fold(text)).strip()
    bare = plain.lstrip(_OPENING).rstrip(_CLOSING)
    return bare or plain


def tokens(text: str) -> list[str]:
    """
    Return the case-folded words of `text`: letters and digits with their combining marks.

    In a script without spaces between words each character is a token; so are emoji. For ASCII text these are the
    tokens of rouge_score.
    """
    if text.isascii():
        return text.encode().translate(_ASCII).decode().split()
    # No word contains a blank, and most pieces between blanks occur again.
    pieces = ((_words if len(piece) <= _LONGEST_CACHED else _words.__wrapped__)(piece) for piece in text.split())
    return [word for piece in pieces for word in piece]


@lru_cache(1 << 16)
def _words(text: str) -> Sequence[str]:
    words: list[str] = []
    extends, takes_marks = False, False
    for character in _fold(text):
        kind = unicodedata.category(character)
        if kind == "Cf":  # joiners and other invisible signs, within words too
            continue
        if kind[0] == "M":
            if takes_marks:
                words[-1] += character
            continue
        spaced = kind[0] in "LN" and not _UNSPACED_SIGN.match(character)
        takes_marks = kind[0] in "LN" or kind == "So"
        if spaced and extends:
            words[-1] += character
        elif takes_marks:
            words.append(character)
        extends = spaced
    return words


def shingles(words: Sequence[str]) -> set[int]:
    """Return this process's hashes of a text's 3-word runs; one or two words are one run, an empty text has none."""
    return set(runs_of_three(words)) or ({hash(tuple(words))} if words else set())


def runs_of_three(words: Sequence[str]) -> Iterator[int]:
    """Yield this process's hash of each three consecutive words, in their order; none of fewer words."""
    return map(hash, zip(words, words[1:], words[2:], strict=False))


def is_short(text: str, most: int) -> bool:
    """
    Return whether `text` has at most `most` words.

    Words are separated by whitespace. In scripts without spaces, such as Chinese, two characters are one word: the
    average in Chinese, a little less than in Japanese and Thai.
    """
    pieces = text.split(None, most)
    if len(pieces) > most or text.isascii():
        return len(pieces) <= most
    counts = [_count_unspaced(piece) for piece in pieces]
    return counts.count(0) + sum(counts) // _CHARACTERS_A_WORD <= most


def _count_unspaced(text: str) -> int:
    signs = _UNSPACED_SIGN.findall(unicodedata.normalize("NFKC", text[:_MOST_CHARACTERS]))
    return sum(unicodedata.category(sign)[0] in "LN" for sign in signs)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
