"""A state folder with drops, on which the prepare step runs, and what it made."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Dataset, Drop, ModelRef
from pipeline.config import EvaluateConfig, GateConfig, RunConfig
from pipeline.contract import Attempt
from pipeline.models.template import fold
from pipeline.prepare.step import prepare
from pipeline.records.heldout import normalise, split_hash
from pipeline.records.records import Row, records_of
from tests.made_artifacts import made_spec

Rows = Sequence[Mapping[str, Any]]
LOOSE = GateConfig(min_records=1)
#: Reading the general suites would take half of the step's time here.
NO_SUITES = EvaluateConfig(general=())
PINNED = LOOSE.model_copy(update={"on": "pinned"})
NUMBERS = itertools.count(1)


def rows(count: int, *, start: int = 0, answer: str = "yes") -> list[dict[str, str]]:
    return [{"instruction": f"Question {number}?", "output": answer} for number in range(start, start + count)]


def prompt_place(salt: str, instruction: str, given: str) -> str:
    """Return the hexadecimal sha256 that decides a prompt's split; as a fraction of its range it is u."""
    return split_hash(salt, normalise(fold(instruction, given)))


class Snapshot:
    """A state folder with drops; `prepare` runs the step on them. With no gate given, pinned ones are judged on."""

    def __init__(self, root: Path, **config: Any) -> None:
        self.root = root / f"state-{next(NUMBERS)}"
        (self.root / "drops").mkdir(parents=True)
        self.drops: list[Drop] = []
        self.aside: set[int] = set()
        """The accepted drops that the run does not use."""
        self.renewed: tuple[int, ...] = ()
        self.champion = ModelRef(model_id="b", path="/base", generation=0)
        usual = {"track": "default", "base_model": "/base", "base_model_id": "b", "salt": "s"}
        self.config = RunConfig(**{**usual, "gate": LOOSE, "evaluate": NO_SUITES, **config})
        self._gate = None if "gate" in config else PINNED

    def drop(self, content: Rows, role: str = "train", *, accepted: bool = False, array: bool = False) -> "Snapshot":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        data = (json.dumps(content) if array else lines).encode()
        sha256 = hashlib.sha256(data).hexdigest()
        path = f"drops/{sha256}.jsonl"
        (self.root / path).write_bytes(data)
        number = len(self.drops) + 1
        value = {"id": number, "sha256": sha256, "name": "d.jsonl", "path": path, "role": role, "rows": len(content)}
        value["records"] = sum(max(1, len(records_of(Row(1, row)))) for row in content)
        value["answers_accepted"] = accepted
        self.drops.append(Drop.model_validate(value))
        if role == "heldout" and self._gate is not None:
            self.config = self.config.model_copy(update={"gate": self._gate})
        return self

    def attempt(self) -> Attempt:
        folder = f"runs/1/attempts/prepare-{next(NUMBERS)}"
        (self.root / folder).mkdir(parents=True)
        lists = {
            "drops": tuple(drop for drop in self.drops if drop.id not in self.aside),
            "elders": tuple(drop for drop in self.drops if drop.id in self.aside),
            "renewed": self.renewed,
        }
        return Attempt(made_spec(self.root, "prepare", self.config, folder=folder, champion=self.champion, **lists))

    def prepare(self) -> "Prepared":
        return Prepared(self.root, prepare(self.attempt()))


class Prepared:
    """What the step made, read back."""

    def __init__(self, root: Path, dataset: Dataset) -> None:
        self.dataset = dataset
        self.folder = root / dataset.folder
        self.train, self.dev, self.heldout = (
            list(durable.read_jsonl(self.folder / f"{name}.jsonl")) for name in ("train", "dev", "heldout")
        )

    def ids(self, side: str) -> set[str]:
        return {row["id"] for row in getattr(self, side)}
