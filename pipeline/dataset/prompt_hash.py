"""Name and place a prompt by the hash of its normalised text."""

import hashlib
import unicodedata

from pipeline.prompt import fold


def normalise(text: str) -> str:
    """Return the form in which two prompts are the same: NFKC, case folded, blanks collapsed."""
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
    """Return where a normalised prompt falls under `salt`, as 64 hexadecimal digits: the split reads them."""
    return hashlib.sha256(_lengths(salt, prompt)).hexdigest()


def _lengths(*texts: str) -> bytes:
    """Join texts so that no two different lists give the same bytes."""
    encoded = [text.encode("utf-8") for text in texts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)
