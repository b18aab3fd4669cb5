"""
Predictions and their cache, under a key of everything that an answer depends on.

Layout: `<spec.predictions>/<key>/*.jsonl`, each line a Prediction, or the ItemScore of a suite's item. Steps only read
it; `evaluate` leaves the predictions it used in its attempt, and the dispatcher copies them to the cache once it is
published. The composition of a batch is not in the key, though in bf16 it can change an answer: as all records of a
held-out set are predicted together, in batches that depend only on the prompts, the cache normally holds all of them or
none. Where it holds a part (the held-out set grew), the rest is batched by itself. An interrupted attempt leaves whole
batches in a log of its own (`batch_log`), from which the run's next attempt resumes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ConfigDict, ValidationError

from pipeline.artifacts import Frozen
from pipeline.errors import CannotTrain

#: The engine of the training stack, with a version to increase when its answers change.
PLAIN = "transformers: 2"


class Setup(Frozen):
    """Everything that answers depend on, except the model."""

    template: str
    """sha256 of the prompt tokens of a fixed request: equal for models that are prompted in the same format."""
    max_new_tokens: int
    repetition_penalty: float
    batch_size: int
    engine: str = PLAIN
    """Name and version of the engine that generates answers."""
    dtype: str
    device: str
    """Kind of device and its name: its arithmetic determines the last bits."""
    attention: str
    versions: dict[str, str]
    """Versions of the libraries that compute the answer."""


class PredictionKey(Frozen):
    """The cache key of a prediction: a model and its setup."""

    model_id: str
    setup: Setup

    @property
    def digest(self) -> str:
        """The sha256 that names the key's folder."""
        return _sha256(self.model_dump(mode="json"))


class _Cached(Frozen):
    model_config = ConfigDict(extra="ignore")  # earlier versions wrote more fields


class Prediction(_Cached):
    """One answer, and the likelihood of one reference."""

    id: str
    prompt_hash: str
    text: str
    tokens: int
    """Generated tokens, including the end token."""
    ended: bool
    """Whether the model generated the end token."""
    nll_sum: float
    """Negative log-likelihood of the reference in nats, summed over `nll_tokens` tokens."""
    nll_tokens: int
    reference_hash: str
    """Hash of the reference's tokens: with another reference the text stays valid, the likelihood does not."""


class ItemScore(_Cached):
    """A model's score on one item of a general suite; cached with its predictions."""

    suite: str
    """sha256 of the suite's items and of the scoring method."""
    item: str
    score: float
    """0 to 1."""
    text: str | None = None
    """The answer to a free question."""


def hash_tokens(tokens: Sequence[int]) -> str:
    """Return the sha256 of a token sequence, for prompts and references."""
    return _sha256(list(tokens))


def comparable(one: PredictionKey, other: PredictionKey) -> None:
    """Raise `CannotTrain`, naming the differences, if two models' predictions were made with different setups."""
    mine, theirs = one.setup.model_dump(), other.setup.model_dump()
    if differing := [name for name in mine if mine[name] != theirs[name]]:
        raise CannotTrain(
            f"candidate and champion have different setups and cannot be compared: {', '.join(differing)}",
            "set train.format and the base model back to the champion's, or use a new track for the new ones",
        )


class PredictionCache:
    """The cached predictions of one key, by prompt."""

    def __init__(self, folder: Path) -> None:
        """Read every *.jsonl in `folder`, which need not exist; damaged lines are skipped."""
        self._answers: dict[str, Prediction] = {}
        self._likelihoods: dict[tuple[str, str], tuple[float, int]] = {}
        self._items: dict[str, dict[str, ItemScore]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n"):
            try:
                if line.startswith(b'{"suite":'):
                    score = ItemScore.model_validate_json(line)
                    self._items.setdefault(score.suite, {}).setdefault(score.item, score)
                else:
                    found = Prediction.model_validate_json(line)
                    # Every run's file has the whole held-out set, so a long-serving champion's are there many times.
                    self._answers.setdefault(found.prompt_hash, found)
                    likelihood = found.nll_sum, found.nll_tokens
                    self._likelihoods.setdefault((found.prompt_hash, found.reference_hash), likelihood)
            except ValidationError:
                continue

    def answer(self, prompt_hash: str) -> Prediction | None:
        """Return the first prediction for the prompt, whatever its reference; `None` if there is none."""
        return self._answers.get(prompt_hash)

    def likelihood(self, prompt_hash: str, reference_hash: str) -> tuple[float, int] | None:
        """Return summed NLL in nats and token count of this reference after the prompt; `None` if not cached."""
        return self._likelihoods.get((prompt_hash, reference_hash))

    def items(self, suite: str) -> dict[str, ItemScore]:
        """Return the cached scores of the suite with this sha256, by the item's id; empty if there are none."""
        return dict(self._items.get(suite, {}))


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
