"""Champions trained over champions: what each was trained on is known of all behind it, and counts as seen."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.artifacts import Adapter, Artifact, Dataset, Model, ModelRef
from pipeline.config import EvaluateConfig, SplitConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, Interrupted
from pipeline.evaluate.step import evaluate
from pipeline.merge.step import merge
from pipeline.models.manifest import Lineage, model_id, read_lineage, trained_ids
from pipeline.prepare.step import prepare
from pipeline.train.step import train
from tests.made_artifacts import heldout_row
from tests.snapshot import Snapshot
from tests.training_runs import StoppedAfter

STEPS = {"prepare": prepare, "train": train, "merge": merge}


def ranks(folder: Path, below: Path) -> int:
    """Return the rank of what a model's weights are beside another one's: that of the adapters between them."""
    name = "model.layers.0.mlp.up_proj.weight"
    one, other = (load_file(each / "model.safetensors")[name] for each in (folder, below))
    values = torch.linalg.svdvals((one - other).double())
    return int((values > 1e-3 * values[0]).sum())


class Line:
    """Nights of one track through the real steps; whatever comes of one becomes the champion when it is told to."""

    def __init__(self, root: Path, base: Path, **settings: Any) -> None:
        learning = {"quantization": "none", "rank": 4, "learning_rate": 3e-3, "epochs": 1, "replay": 0.0, **settings}
        self.data = Snapshot(
            root,
            base_model=str(base),
            base_model_id=model_id(base),
            split=SplitConfig(heldout=0.2, dev=0),
            train=TrainConfig(start="champion", **learning),
            evaluate=EvaluateConfig(batch_size=8, general=()),
        )
        self.root, self.base = self.data.root, base
        self.data.champion = ModelRef(model_id=self.data.config.base_model_id, path=str(base), generation=0)
        self.made: dict[str, Artifact] = {}

    def attempt(self, step: str) -> Attempt:
        """Make an attempt at a step over what this night's earlier steps made."""
        spec = self.data.attempt().spec.model_copy(update={"step": step, "inputs": {}})
        for name, artifact in self.made.items():
            spec.inputs[name] = f"{spec.folder}.{name}.json"
            durable.write_json(self.root / spec.inputs[name], artifact.model_dump(mode="json"))
        return Attempt(spec)

    def night(self, rows: list[dict[str, str]]) -> tuple[Dataset, Adapter, Model]:
        """Drop rows, prepare, train and merge."""
        self.data.drop(rows)
        self.forget()
        self.made = {}
        for name, step in STEPS.items():
            self.made[name] = step(self.attempt(name))
        return self.made["prepare"], self.made["train"], self.made["merge"]  # type: ignore[return-value]

    def forget(self) -> None:
        """Remove the checkpoints of the run's training, if there are any."""
        shutil.rmtree(self.root / self.data.attempt().spec.checkpoints, ignore_errors=True)

    def crown(self, model: Model) -> ModelRef:
        """Let a model be the champion, where models are kept."""
        path = f"models/{model.model_id}"
        if not (self.root / path).exists():
            shutil.copytree(self.root / model.folder, self.root / path)
        drops = tuple(drop.id for drop in self.data.drops)
        generation = self.data.champion.generation + 1
        self.data.champion = ModelRef(model_id=model.model_id, path=path, generation=generation, drops=drops)
        return self.data.champion

    def rows_of(self, dataset: Dataset) -> list[dict[str, Any]]:
        return list(durable.read_jsonl(self.root / dataset.folder / "train.jsonl"))

    def ids(self, dataset: Dataset) -> set[str]:
        return {row["id"] for row in self.rows_of(dataset)}


def test_each_champion_knows_what_all_behind_it_were_trained_on_and_none_is_judged_on_it(
    tmp_path: Path, tiny: Any, tiny_llama: Path
) -> None:
    rows, line = tiny.rows(190, seed=5), Line(tmp_path, tiny_llama)
    behind: set[str] = set()
    nights: list[tuple[Dataset, Adapter, Model]] = []
    champions: list[ModelRef | None] = [None]
    for night in range(3):
        dataset, adapter, model = line.night(rows[60 * night : 60 * night + 60])
        assert (dataset.start, adapter.start) == (champions[-1], champions[-1])
        assert adapter.base_model_id == model_id(tiny_llama)
        assert dataset.old_rows == len(behind)
        assert not line.ids(dataset) & behind
        behind |= line.ids(dataset)
        assert trained_ids(line.root / model.folder) == behind
        assert read_lineage(line.root / model.folder) == Lineage(model_id(tiny_llama), night + 1)
        nights.append((dataset, adapter, model))
        champions.append(line.crown(model))
    last, first = dict(line.made), nights[0][0]
    known, unseen = line.rows_of(first)[0], rows[185]
    pinned = [{name: row[name] for name in ("instruction", "input", "output")} for row in (known, unseen)]
    line.data.drop(pinned, "heldout")
    # The last training did not see the record: that it is known comes from the champions before.
    found = prepare(line.data.attempt())
    scored = [row["input"] for row in durable.read_jsonl(line.root / found.folder / "heldout.jsonl")]
    assert (found.seen_by_champion, scored) == (1, [unseen["input"]])
    # Back at the base, which knows none of it: the candidate is found out.
    held = [heldout_row(known["id"], pinned[0]), heldout_row("f" * 32, unseen)]
    folder = line.root / first.folder / "heldout.jsonl"
    folder.write_text("".join(json.dumps(row) + "\n" for row in held))
    line.made = {"prepare": first.model_copy(update={"heldout_rows": 2}), "merge": nights[1][2]}
    line.data.champion = ModelRef(model_id=model_id(tiny_llama), path=str(tiny_llama), generation=4)
    report = evaluate(line.attempt("evaluate"))
    assert (report.records, report.records_seen_by_candidate) == (2, 1)
    # A champion whose list is gone is neither trained nor merged into.
    line.made, before = last, champions[2]
    assert before is not None
    (line.root / before.path / "trained-ids.txt").unlink()
    for name in ("train", "merge"):
        with pytest.raises(CannotTrain, match=r"trained-ids\.txt is missing"):
            STEPS[name](line.attempt(name))


def test_a_training_over_the_champion_resumes_to_the_same_weights_and_never_from_one_over_the_base(
    tmp_path: Path, tiny: Any, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.rows(120, seed=5)
    line = Line(tmp_path, tiny_llama, epochs=2)
    _, _, model = line.night(rows[:60])
    line.crown(model)
    dataset, whole, merged = line.night(rows[60:])
    assert dataset.start is not None

    def adapter_of(made: Adapter) -> dict[str, torch.Tensor]:
        return load_file(line.root / made.folder / "adapter_model.safetensors")

    def cut(given: Dataset) -> None:
        line.made = {"prepare": given}
        with pytest.raises(Interrupted):
            train(StoppedAfter(line.attempt("train").spec))

    line.forget()
    cut(dataset)
    resumed = train(line.attempt("train"))
    assert resumed.resumed_from_step > 0
    same, found = adapter_of(whole), adapter_of(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in same.items())
    # The same rows over the base are another training.
    line.forget()
    cut(dataset.model_copy(update={"start": None}))
    line.made = {"prepare": dataset}
    again = train(line.attempt("train"))
    assert again.resumed_from_step == 0
    assert capsys.readouterr().err.count("is skipped: it belongs to another training") == 1
    assert all(torch.equal(adapter_of(again)[name], tensor) for name, tensor in same.items())
    assert [ranks(line.root / merged.folder, below) for below in (line.root / dataset.start.path, tiny_llama)] == [4, 8]
