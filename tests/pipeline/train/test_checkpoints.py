"""Checkpoints that can be trusted, and a training that goes on from one as if nothing had happened."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.artifacts import Adapter, Dataset
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import Interrupted
from pipeline.models.manifest import model_id
from pipeline.records.heldout import dataset_hash
from pipeline.train.checkpoints import COMPLETE, LISTING, fingerprint, newest_valid, publish, step_of
from pipeline.train.step import train
from tests.prepared_rows import write_rows
from tests.stopped_attempt import StoppedAfter

MARK = fingerprint({"dataset": "d"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with the steps 10 and 20."""
    for step in (10, 20):
        publish(written(tmp_path, step), tmp_path / "checkpoints", step, MARK)
    return tmp_path / "checkpoints"


def written(place: Path, step: int) -> Path:
    """Return a checkpoint as the trainer leaves it."""
    source = place / f"checkpoint-{step}"
    source.mkdir()
    (source / "optimizer.pt").write_bytes(b"moments" * step)
    (source / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return source


def test_the_newest_whole_checkpoint_is_found(folder: Path) -> None:
    assert newest_valid(folder, MARK) == folder / "step-20"
    assert step_of(folder / "step-20") == 20


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere", MARK) is None


def test_the_newest_two_are_kept(folder: Path, tmp_path: Path) -> None:
    publish(written(tmp_path, 100), folder, 100, MARK)
    assert sorted(path.name for path in folder.iterdir()) == ["step-100", "step-20"]


def test_torn_and_foreign_ones_of_later_steps_do_not_push_a_whole_one_out(folder: Path, tmp_path: Path) -> None:
    (publish(written(tmp_path, 80), folder, 80, MARK) / COMPLETE).unlink()
    publish(written(tmp_path, 90), folder, 90, "another training")
    publish(written(tmp_path, 30), folder, 30, MARK)
    publish(written(tmp_path, 40), folder, 40, MARK)
    assert sorted(path.name for path in folder.iterdir()) == ["step-30", "step-40"]


def test_a_step_that_was_left_torn_is_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "step-20" / COMPLETE).unlink()
    publish(written(tmp_path, 20), folder, 20, MARK)
    assert newest_valid(folder, MARK) == folder / "step-20"


def test_what_a_training_skipped_is_not_counted_among_those_that_are_kept(folder: Path, tmp_path: Path) -> None:
    other = fingerprint({"dataset": "other"})
    publish(written(tmp_path, 5), folder, 5, other)
    assert [path.name for path in folder.iterdir()] == ["step-5"], "it could not go on from 10 or 20"
    (folder / "step-6").mkdir()
    publish(written(tmp_path, 7), folder, 7, other)
    assert sorted(path.name for path in folder.iterdir()) == ["step-5", "step-7"], "a torn one takes no place"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


TORN: dict[str, Callable[[Path], object]] = {
    "COMPLETE is missing": lambda step: (step / COMPLETE).unlink(),
    "COMPLETE is empty": lambda step: (step / COMPLETE).write_text(""),
    "COMPLETE holds no object": lambda step: (step / COMPLETE).write_text("[]"),
    "a file is cut off": lambda step: cut(step / "optimizer.pt"),
    "a byte has changed": lambda step: flip(step / "optimizer.pt"),
    "a file is missing": lambda step: (step / "trainer_state.json").unlink(),
    "the listing is missing": lambda step: (step / LISTING).unlink(),
    "the listing was edited": lambda step: (step / LISTING).write_text("{}"),
}


@pytest.mark.parametrize("damage", TORN)
def test_the_older_one_is_taken_when(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    TORN[damage](folder / "step-20")
    assert newest_valid(folder, MARK) == folder / "step-10"
    assert capsys.readouterr().err.startswith("checkpoint step-20 is skipped: ")


def test_a_checkpoint_without_complete_is_skipped_though_all_that_it_lists_is_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "step-20" / COMPLETE).unlink()
    listing = durable.read_json(folder / "step-20" / LISTING)
    assert listing["fingerprint"] == MARK
    for name, entry in listing["files"].items():
        assert durable.sha256_file(folder / "step-20" / name) == entry["sha256"], "the manifest verifies"
    assert newest_valid(folder, MARK) == folder / "step-10"
    assert "writing it was interrupted" in capsys.readouterr().err


def test_a_checkpoint_of_another_training_is_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_valid(folder, fingerprint({"dataset": "other"})) is None
    assert "another training" in capsys.readouterr().err


def test_a_fingerprint_does_not_depend_on_the_order_of_its_parts() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


# Real trainings ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nf4", "none"])
def setup(request: Any, tiny: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> tuple[RunConfig, Dataset]:
    """Fifty rows, 8 a step in two packed passes or more: 7 steps an epoch, three epochs, dropout, a dev curve."""
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")
    made = tiny.rows(74, seed=3)
    dataset = write_rows(tmp_path, made[:50], made[50:])
    settings = TrainConfig(
        quantization=request.param,
        rank=4,
        alpha=8,
        dropout=0.1,
        learning_rate=3e-3,
        epochs=3,
        batch_size=8,
        batch_tokens=200,
        checkpoint_minutes=1e-6,
    )
    config = RunConfig(
        track="default", base_model=str(tiny_llama), base_model_id=model_id(tiny_llama), salt="s", train=settings
    )
    return config, dataset


def weights(attempt: Attempt, adapter: Adapter) -> dict[str, Any]:
    return load_file(attempt.path(adapter.folder) / "adapter_model.safetensors")


def test_a_training_stopped_in_its_second_epoch_and_resumed_ends_in_the_same_weights(
    setup: tuple[RunConfig, Dataset],
    make_attempt: Callable[..., Attempt],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, dataset = setup
    straight = make_attempt("train", config=config, inputs={"prepare": dataset})
    whole = train(straight)
    assert whole.resumed_from_step == 0
    assert whole.optimizer_steps == 21
    shutil.rmtree(tmp_path / "runs/1/checkpoints")

    stopped = StoppedAfter(make_attempt("train", config=config, inputs={"prepare": dataset}).spec)
    stopped.step = 10
    with pytest.raises(Interrupted, match="step 11 of 21"):
        train(stopped)
    assert not (stopped.folder / "scratch").exists()
    cut(tmp_path / "runs/1/checkpoints/step-11/optimizer.pt")

    resumed = make_attempt("train", config=config, inputs={"prepare": dataset})
    adapter = train(resumed)
    said = capsys.readouterr().err
    assert said.count("records are packed\n") == 3
    assert adapter.resumed_from_step == 10
    assert adapter.optimizer_steps == 21
    expected = weights(straight, whole)
    found = weights(resumed, adapter)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert said.count("is skipped") == 1
    assert "step-11 is skipped: optimizer.pt is missing, truncated or changed" in said
    assert [point.step for point in adapter.loss_curve] == list(range(1, 22))
    assert adapter.trained_tokens == whole.trained_tokens
    assert adapter.adapter_change == pytest.approx(whole.adapter_change)


def test_a_checkpoint_of_other_data_is_not_resumed(
    setup: tuple[RunConfig, Dataset],
    make_attempt: Callable[..., Attempt],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, dataset = setup
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 0.5})})
    train(make_attempt("train", config=config, inputs={"prepare": dataset}))
    assert sorted(path.name for path in (tmp_path / "runs/1/checkpoints").glob("step-*")) == ["step-2", "step-3"]
    with (tmp_path / "data/train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "instruction": "x", "input": "", "output": "y"}) + "\n")
    other = dataset.model_copy(update={"dataset_sha256": dataset_hash(tmp_path / "data")})
    adapter = train(make_attempt("train", config=config, inputs={"prepare": other}))
    assert adapter.resumed_from_step == 0
    assert capsys.readouterr().err.count("is skipped: it belongs to another training") == 2
