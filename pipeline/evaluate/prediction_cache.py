"""
Values that a model gave for requests, under a key of everything else that they depend on.

An attempt appends each batch that it computes to a file of its own as one line, so that after a kill or a power cut the
batch is there with all of its rows or not at all. The next attempt copies what is there, and forms the batches of an
uninterrupted one, from the requests that are not cached: in bf16 the composition of a batch, which is not in the key,
can change an answer. Once the attempt is published, the dispatcher links the file into the cache, which is read
only: `<spec.predictions>/<key>/*.jsonl`. A line maps hashes of requests to values: a likelihood, an answer, the
likelihoods of a question's choices.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import durable
from pipeline.artifacts import Frozen
from pipeline.errors import CannotTrain
from pipeline.models.prefill import Tokens

#: The engine of the training stack, with a version to increase when its answers change.
PLAIN = "transformers: 2"
#: Part of every request's hash; increase it when a kind's values change.
_LAYOUT = "an answer is text, tokens, ended: 3"

Kind = Literal["likelihood", "choice", "answer"]


class PredictionKey(Frozen):
    """Everything that a model's answers depend on: the model and its setup."""

    model_id: str
    template: str
    """sha256 of the prompt tokens of a fixed request: equal for models that are prompted in the same format."""
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

    @property
    def digest(self) -> str:
        """The sha256 that names the key's folder."""
        return durable.sha256_json(self.model_dump(mode="json"))


class Request(NamedTuple):
    """A request to a model: for the likelihood of a completion, for those of a question's choices, or for an answer."""

    kind: Kind
    tokens: Tokens
    """Of the prompt."""
    target: Any
    """Tokens of the completion, tokens of each choice, or the most tokens of the answer."""
    may_loop: bool = False
    """Whether a looping answer is not cut; not in the key."""

    @property
    def key(self) -> str:
        """The `request_hash` of kind, tokens and target, under which its value is cached."""
        return request_hash(self.kind, [self.tokens, self.target])

    @property
    def limit(self) -> int:
        """Most tokens of an answer, else 0."""
        return self.target if self.kind == "answer" else 0

    @property
    def longest(self) -> int:
        """Most tokens that may follow the prompt: of the completion, a choice or an answer."""
        return max(map(len, self.target)) if self.kind == "choice" else self.limit or len(self.target)


def request_hash(kind: str, request: object) -> str:
    """Return a request's key, the sha256 of the cache's layout, `kind` and `request`, its tokens as a JSON value."""
    return durable.sha256_json([_LAYOUT, kind, request])


def comparable(candidate: PredictionKey, other: PredictionKey, role: str) -> None:
    """Raise `CannotTrain`, naming the differences, if candidate and `other`, of the role `role`, have other setups."""
    mine, theirs = candidate.model_dump(exclude={"model_id"}), other.model_dump()
    if differing := [name for name in mine if mine[name] != theirs[name]]:
        raise CannotTrain(
            f"candidate and {role} have different setups and cannot be compared: {', '.join(differing)}",
            "set train.format and the base model back to the champion's, or use a new track for the new ones",
        )


def read_values(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the values in `paths` by their keys, of each key the last; damaged lines and gone files are skipped."""
    values: dict[str, Any] = {}
    for path in paths:
        with suppress(FileNotFoundError):  # a collection may have removed it since it was listed
            for line in path.read_bytes().split(b"\n"):
                with suppress(ValueError, AttributeError):
                    values.update(json.loads(line).items())
    return values


def append_values(path: Path, values: Mapping[str, Any]) -> None:
    """
    Append JSON `values` to `path`, created on first use, as one line, durably; only one process may append to a file.

    Raises `OSError` if the file cannot be written, `ValueError` if a value is not finite.
    """
    line = json.dumps(values, allow_nan=False).encode() + b"\n"
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fdatasync(file.fileno())
