"""Compute a prompt's id and its place among all prompts, by hashes of its normalised text."""

import hashlib
import math
import unicodedata

from pipeline.models.prompt import fold

#: So many standard deviations above the mean lie 5 in 100 cases.
_SURE = 1.645


def normalise(text: str) -> str:
    """Return a text in the form in which prompts are compared: NFKC, case folded, blanks collapsed."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def prompt_id(instruction: str, given: str) -> str:
    """Return a record's id, 32 hexadecimal digits: the same for prompts that are the same once normalised."""
    return hash_id(normalise(fold(instruction, given)))


def hash_id(prompt: str) -> str:
    """Return the id of a normalised prompt: 32 hexadecimal digits."""
    return hashlib.sha256(_lengths(prompt)).hexdigest()[:32]


def hash_place(salt: str, prompt: str) -> str:
    """Return a normalised prompt's place under `salt`, 64 hexadecimal digits: its split depends on them."""
    return hashlib.sha256(_lengths(salt, prompt)).hexdigest()


def rows_for(records: int, share: float) -> float:
    """
    Return the number of rows of which at least `records` are held out in 95 of 100 cases, each with chance `share`.

    By the normal distribution that is near to the binomial one: rows * share - z sqrt(rows * share (1 - share)) is
    `records`, solved for rows. `share` must be above 0.
    """
    spread = _SURE * math.sqrt(1 - share)
    return ((spread + math.sqrt(spread**2 + 4 * records)) / 2) ** 2 / share


def _lengths(*texts: str) -> bytes:
    """Join texts so that no two different lists give the same bytes."""
    encoded = [text.encode("utf-8") for text in texts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)
