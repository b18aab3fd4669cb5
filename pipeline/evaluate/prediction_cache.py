"""
Predictions and their cache: what a model answered, under a key that names everything the answer depends on.

Layout: `<spec.predictions>/<key>/*.jsonl`, each line a Prediction, or the ItemScore of a suite's item. Steps only read
it; `evaluate` leaves what it used in its attempt, and the dispatcher copies that in once it is published. What is there
is never made again, one that is missing always is. The composition of a batch is not in the key, though in bf16 it can
change an answer: as all records of a held-out set are predicted together, in batches that depend on nothing but the
prompts, the cache normally holds all of them or none. Where only a part is there (the held-out set grew), the rest is
batched by itself. An attempt that was cut off leaves whole batches in a log of its own (`batch_log`), which the run's
next attempt goes on from.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from pipeline.artifacts import Frozen
from pipeline.errors import CannotTrain

#: A score's first field is its suite: so far it is looked for in a line.
_HEAD = 16
#: The engine of the training stack, and what of it can change an answer.
PLAIN = "transformers: 1"


class Setup(Frozen):
    """Everything but the model that its answers depend on."""

    template: str
    """sha256 of the prompt tokens of a fixed request: two models with the same one are asked in the same format."""
    max_new_tokens: int
    repetition_penalty: float
    batch_size: int
    engine: str = PLAIN
    """What answers, and what of it can change an answer."""
    dtype: str
    device: str
    """Kind of device and its name, as its arithmetic decides the last bits."""
    attention: str
    versions: dict[str, str]
    """Of the libraries that compute the answer."""


class PredictionKey(Frozen):
    """Where a prediction may be found again: one model asked in one way."""

    model_id: str
    setup: Setup

    @property
    def digest(self) -> str:
        """The sha256 that names the key's folder."""
        return _sha256(self.model_dump(mode="json"))


class Prediction(Frozen):
    """One answer, and how likely the model found one reference."""

    id: str
    prompt_hash: str
    text: str
    tokens: int
    """Generated tokens, the one that ends the answer included."""
    ended: bool
    """Whether the model ended the answer by itself."""
    seconds: float
    """Its share of the time that its batch took to generate."""
    nll_sum: float
    """Negative log-likelihood of the reference in nats, summed over `nll_tokens` tokens."""
    nll_tokens: int
    reference_hash: str
    """Of the reference's tokens: with another reference the text still holds and the likelihood does not."""


class ItemScore(Frozen):
    """What a model got for one item of a suite of general abilities; kept beside its predictions."""

    suite: str
    """sha256 of the suite's items and of how they are scored."""
    item: str
    category: str
    score: float
    """0 to 1."""
    text: str | None = None
    """The answer to a question that is answered freely."""


def hash_tokens(tokens: Sequence[int]) -> str:
    """Return the sha256 of a token sequence, for prompts and references."""
    return _sha256(list(tokens))


def comparable(one: PredictionKey, other: PredictionKey) -> None:
    """Raise `CannotTrain` if the two models' predictions were not made in the same way, naming what differs."""
    mine, theirs = one.setup.model_dump(), other.setup.model_dump()
    differing = {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
    if not differing:
        return
    words = ", ".join(f"{name} {_short(pair[0])} and {_short(pair[1])}" for name, pair in differing.items())
    message = f"candidate and champion were not asked in the same way, so their answers cannot be compared: {words}"
    hint = "set train.format and the base model back to the champion's, or give the new ones a track of their own"
    raise CannotTrain(message, hint)


class PredictionCache:
    """The predictions already made under one key, by prompt."""

    def __init__(self, places: Iterable[Path]) -> None:
        """Read every *.jsonl in the folders `places` that exist; a damaged line counts as missing."""
        self._by_prompt: dict[str, list[Prediction]] = {}
        self._items: dict[str, dict[str, ItemScore]] = {}
        for place in places:
            for path in sorted(place.glob("*.jsonl")):
                self._read(path)

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):
            try:
                if b'"suite":' in line[:_HEAD]:
                    score = ItemScore.model_validate_json(line)
                    self._items.setdefault(score.suite, {}).setdefault(score.item, score)
                else:
                    found = Prediction.model_validate_json(line)
                    known = self._by_prompt.setdefault(found.prompt_hash, [])
                    # Every run's file has the whole held-out set: a champion of many nights is there as often.
                    if all(one.reference_hash != found.reference_hash for one in known):
                        known.append(found)
            except ValidationError:
                continue

    def answer(self, prompt_hash: str) -> Prediction | None:
        """Return a prediction for the prompt, whatever its reference was; the first one made, always the same."""
        found = self._by_prompt.get(prompt_hash)
        return found[0] if found else None

    def likelihood(self, prompt_hash: str, reference_hash: str) -> tuple[float, int] | None:
        """Return summed NLL and token count of exactly this reference after the prompt, if it was computed."""
        for found in self._by_prompt.get(prompt_hash, ()):
            if found.reference_hash == reference_hash:
                return (found.nll_sum, found.nll_tokens)
        return None

    def items(self, suite: str) -> dict[str, ItemScore]:
        """Return what is known of the suite with this sha256, by item."""
        return dict(self._items.get(suite, {}))


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}\u2026"  # noqa: PLR2004 - a hash, of no use to a reader in full
