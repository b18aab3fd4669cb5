"""Checkpoints that can be trusted, and a training that goes on from one as if nothing had happened."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.records.heldout import dataset_hash
from pipeline.train.checkpoints import LISTING, newest_valid, publish
from pipeline.train.trainer import Trainer
from tests.model_folder import flip
from tests.training_runs import TrainingRun, same

MARK = "the training"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with the steps 10 and 20."""
    for step in (10, 20):
        publish(written(tmp_path, step), tmp_path / "checkpoints", step, MARK, 1)
    return tmp_path / "checkpoints"


def written(place: Path, step: int) -> Path:
    """Return a checkpoint as the trainer leaves it."""
    source = place / f"checkpoint-{step}"
    source.mkdir()
    (source / "optimizer.pt").write_bytes(b"moments" * step)
    (source / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return source


def test_the_newest_two_are_kept(folder: Path, tmp_path: Path) -> None:
    publish(written(tmp_path, 100), folder, 100, MARK, 1)
    assert newest_valid(folder, MARK) == folder / "step-100-1"
    assert sorted(path.name for path in folder.iterdir()) == ["step-100-1", "step-20-1"]


def test_torn_and_foreign_ones_of_later_steps_do_not_push_a_whole_one_out(folder: Path, tmp_path: Path) -> None:
    (publish(written(tmp_path, 80), folder, 80, MARK, 1) / LISTING).unlink()
    publish(written(tmp_path, 90), folder, 90, "another training", 1)
    publish(written(tmp_path, 30), folder, 30, MARK, 1)
    publish(written(tmp_path, 40), folder, 40, MARK, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-30-1", "step-40-1"]


def test_an_attempt_removes_no_checkpoint_of_a_later_one(folder: Path, tmp_path: Path) -> None:
    publish(written(tmp_path, 40), folder, 40, MARK, 2)
    publish(written(tmp_path, 30), folder, 30, MARK, 1)
    assert newest_valid(folder, MARK) == folder / "step-40-2"
    publish(written(tmp_path, 50), folder, 50, MARK, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-40-2", "step-50-2"]


def test_a_step_that_was_left_torn_is_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "step-20-1" / LISTING).unlink()
    publish(written(tmp_path, 20), folder, 20, MARK, 1)
    assert newest_valid(folder, MARK) == folder / "step-20-1"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


TORN: dict[str, Callable[[Path], object]] = {
    "a file is cut off": lambda step: cut(step / "optimizer.pt"),
    "a byte has changed": lambda step: flip(step / "optimizer.pt"),
    "a file is missing": lambda step: (step / "trainer_state.json").unlink(),
    "the listing is missing": lambda step: (step / LISTING).unlink(),
    "the listing is empty": lambda step: (step / LISTING).write_text(""),
    "the listing holds no object": lambda step: (step / LISTING).write_text("[]"),
    "the listing was edited": lambda step: (step / LISTING).write_text("{}"),
    "a byte of the listing has changed": lambda step: flip(step / LISTING),
}


@pytest.mark.parametrize("damage", TORN)
def test_the_older_one_is_taken_when(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    TORN[damage](folder / "step-20-1")
    assert newest_valid(folder, MARK) == folder / "step-10-1"
    assert capsys.readouterr().err.startswith("checkpoint step-20-1 is skipped: ")


# Real trainings ----------------------------------------------------------------------------------------------------


def test_a_training_stopped_in_its_second_epoch_and_resumed_ends_in_the_same_weights(
    new_run: Callable[..., TrainingRun],
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The last step's weights are kept, though the dev loss is lowest at step 10.
    monkeypatch.setattr(Trainer, "dev_loss", lambda trainer: 1.0 + abs(trainer.state.global_step - 10))
    run = new_run(tiny_llama, quantization="nf4", dropout=0.1)
    whole, expected = run.finish()
    assert (whole.resumed_from_step, whole.optimizer_steps) == (0, 21)
    run.forget()
    assert not (run.stop_after(10).folder / "scratch").exists()
    cut(run.checkpoints / "step-11-2/optimizer.pt")
    lowest = load_file(run.checkpoints / "step-10-2/adapter_model.safetensors")
    adapter, found = run.finish()
    said = capsys.readouterr().err
    assert said.count("records are packed\n") == 3
    assert (adapter.resumed_from_step, adapter.optimizer_steps) == (10, 21)
    assert same(found, expected)
    assert not same(found, lowest)
    assert [point.step for point in adapter.dev_curve] == [*range(2, 21, 2), 21]
    assert adapter.dev_curve == whole.dev_curve
    assert said.count("is skipped") == 1
    assert "step-11-2 is skipped: optimizer.pt has " in said
    assert [point.step for point in adapter.loss_curve] == list(range(1, 22))
    assert adapter.trained_tokens == whole.trained_tokens


def test_a_checkpoint_of_other_data_or_other_settings_is_not_resumed(
    new_run: Callable[..., TrainingRun], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tiny_llama, quantization="none", learning_rate="auto", epochs="auto", batch_size=50)
    run.stop_after(2)
    adapter, _ = run.finish(learning_rate=5e-4, epochs=4)
    assert adapter.resumed_from_step == 3, "what was chosen, set as numbers"
    run.forget()
    run.stop_after(2)
    assert run.finish(epochs=3)[0].resumed_from_step == 0
    assert run.finish(learning_rate=1e-3, epochs=3)[0].resumed_from_step == 0
    capsys.readouterr()
    with (run.root / "data/train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "instruction": "x", "input": "", "output": "y"}) + "\n")
    run.dataset = run.dataset.model_copy(update={"dataset_sha256": dataset_hash(run.root / "data")})
    adapter, _ = run.finish(learning_rate=1e-3, epochs=3)
    assert adapter.resumed_from_step == 0
    assert capsys.readouterr().err.count("is skipped: it belongs to another training") == 2
