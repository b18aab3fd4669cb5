"""Identify prompts by hashes, describe the held-out records that `prepare` writes, and hash its files."""

import hashlib
import math
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.models.template import History, Turn, conversation, fold

#: The files that `prepare` writes and `dataset_hash` covers.
NAMES = ("train.jsonl", "dev.jsonl", "heldout.jsonl")
#: 5 % of a normal distribution lie more than this many standard deviations above the mean.
_SURE = 1.645


class HeldoutRecord(Frozen):
    """A held-out prompt with its reference answers."""

    id: str
    instruction: str
    input: str
    output: str
    """The answer whose likelihood is measured."""
    references: tuple[str, ...]
    drop: int
    pinned: bool
    tags: tuple[str, ...]
    near: tuple[str, ...]
    """Ids of its near-duplicates: training prompts, which are left out, and held-out ones, which are not scored."""
    group: str
    """The lowest id of the scored records that count as one with it; its own if there are no others."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and text of the turns before the question, a system message included; the answers are the data's."""

    @property
    def content(self) -> str:
        """The user message: the instruction, followed by the input if there is one."""
        return fold(self.instruction, self.input)

    def messages(self, answer: str | None = None) -> list[Turn]:
        """Return the turns before the question, the user message and, unless it is `None`, `answer`."""
        return conversation(self.turns, self.content, answer)

    def is_known(self, trained: frozenset[str]) -> bool:
        """Return whether this record or a near-duplicate is in `trained`, the ids that a model was trained on."""
        return self.id in trained or not trained.isdisjoint(self.near)


def version_of(ids: Iterable[str]) -> str:
    """Return the sha256 of a set of record ids, in hexadecimal, independent of their order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def dataset_hash(folder: Path) -> str:
    """Return one sha256 of train.jsonl, dev.jsonl and heldout.jsonl in `folder`; a missing file counts as empty."""
    paths = [folder / name for name in NAMES]
    hashes = [durable.sha256_file(path) if path.exists() else hashlib.sha256().hexdigest() for path in paths]
    lines = (f"{name} {digest}\n" for name, digest in zip(NAMES, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def normalise(text: str) -> str:
    """
    Return a text as prompts and answers are compared: NFKC, case folded, without invisible signs (category Cf).

    Each run of white space is one space, and there is none at the ends.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    seen = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    folded = unicodedata.normalize("NFKC", seen).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def prompt_id(instruction: str, given: str, history: History = ()) -> str:
    """Return the id of a record with the input `given` after the turns of `history`: `hash_id` of its prompt."""
    return hash_id(*prompt_parts(history, fold(instruction, given)))


def prompt_parts(history: History, content: str) -> list[str]:
    """Return what identifies a prompt: the user message, then role and text of each earlier turn, texts normalised."""
    return [normalise(content), *(part for role, text in history for part in (role, normalise(text)))]


def hash_id(*prompt: str) -> str:
    """Return the id of a prompt by its `prompt_parts`: 32 hexadecimal digits."""
    return hashlib.sha256(_lengths(*prompt)).hexdigest()[:32]


def split_hash(salt: str, *unit: str) -> str:
    """Return the hash that decides the split of a normalised prompt, or of another unit: 64 hexadecimal digits."""
    return hashlib.sha256(_lengths(salt, *unit)).hexdigest()


def rows_for(records: int, share: float) -> float:
    """
    Return how many rows yield at least `records` held-out ones with 95 % probability; `share` is each row's chance.

    By the normal approximation of the binomial distribution: rows * share - z sqrt(rows * share (1 - share)) is
    `records`, solved for rows. `share` must be above 0.
    """
    spread = _SURE * math.sqrt(1 - share)
    return ((spread + math.sqrt(spread**2 + 4 * records)) / 2) ** 2 / share


def _lengths(*texts: str) -> bytes:
    """Join texts, each prefixed with its length, so that different lists never give the same bytes."""
    encoded = [text.encode("utf-8") for text in texts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)
