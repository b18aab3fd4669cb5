"""Split a text of any script into words."""

import re
import unicodedata
from itertools import islice

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


#: Codes that are looked through at a time: a long piece is read to its end only where nothing is found in it.
_WINDOW = 256


_UNSPACED_SIGN = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED) + "]")


_ASCII_WORD = re.compile(r"[a-z0-9]+")


_SPACE = re.compile(r"\s+")


# Signs that carry meaning at an edge (minus, percent, #, currency, @) are not here.
_QUOTES = "\"'`*_ \u2018\u2019\u201a\u201c\u201d\u201e"


_OPENING = _QUOTES + "([{<\u00a1\u00ab\u00bf\u2039\u3008\u300a\u300c\u300e\u3010"


_CLOSING = _QUOTES + ")]}>.,;:!?\u00bb\u060c\u061f\u06d4\u0964\u203a\u3001\u3002\u3009\u300b\u300d\u300f\u3011"


def normalise(text: str) -> str:
    """
    Return `text` as exact match compares it: NFKC, without case, single spaces, no punctuation around it.

    Quotes, brackets, emphasis and the marks that end a sentence go; a sign that belongs to a value (-5, 50%, .5, C#)
    stays. Text of nothing but punctuation is kept.
    """
    plain = _SPACE.sub(" ", _fold(text)).strip()
    bare = plain.lstrip(_OPENING).rstrip(_CLOSING)
    return bare or plain


def tokens(text: str) -> list[str]:
    """
    Return the words of `text` without case: letters and digits with the marks that belong to them.

    A script without spaces between words gives a token a character; emoji are tokens too. For ASCII text these are the
    tokens that rouge_score makes itself.
    """
    folded = _fold(text)
    if folded.isascii():
        return _ASCII_WORD.findall(folded)
    found: list[str] = []
    extends, takes_marks = False, False
    for character in folded:
        kind = unicodedata.category(character)
        if kind == "Cf":  # joiners and other invisible signs, within words too
            continue
        if kind[0] == "M":
            if takes_marks:
                found[-1] += character
            continue
        spaced = kind[0] in "LN" and not _is_unspaced(character)
        takes_marks = kind[0] in "LN" or kind == "So"
        if spaced and extends:
            found[-1] += character
        elif takes_marks:
            found.append(character)
        extends = spaced
    return found


def is_short(text: str, most: int) -> bool:
    """
    Return whether `text` has at most so many words, looking no further than it must.

    A word is what stands between blanks, a code or an address too. In a script without spaces two characters count as
    one: a word has about so many in Chinese, and a few more in Japanese and Thai.
    """
    pieces = text.split(None, most)
    if len(pieces) > most or text.isascii():
        return len(pieces) <= most
    enough = _CHARACTERS_A_WORD * (most + 1)
    counts = [_unspaced(piece, enough) for piece in pieces]
    return counts.count(0) + sum(counts) // _CHARACTERS_A_WORD <= most


def _unspaced(text: str, enough: int) -> int:
    """Return how many of the tokens are single characters of a script without spaces; stop at `enough`."""
    # A mark that is parted from its character is not counted, so it does not matter where a window ends.
    windows = (unicodedata.normalize("NFKC", text[at : at + _WINDOW]) for at in range(0, len(text), _WINDOW))
    found = (sign[0] for window in windows for sign in _UNSPACED_SIGN.finditer(window))
    characters = (sign for sign in found if unicodedata.category(sign)[0] in "LN")
    return sum(1 for _ in islice(characters, enough))


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _is_unspaced(character: str) -> bool:
    point = ord(character)
    return any(first <= point <= last for first, last in _UNSPACED)
