"""Training: what the trainer is given, what comes out, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.contract import Curve, thinned
from pipeline.errors import CannotTrain, Interrupted
from pipeline.models.generation import load_template
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.train.step import tokenise, train
from pipeline.train.trainer import Trainer
from tests.made_adapters import made_training
from tests.training_runs import TrainingRun

Begin = Callable[..., TrainingRun]


@pytest.fixture
def begin(new_run: Begin) -> Begin:
    """Begin a run on such rows, one epoch without quantisation: begin(base, rows, dev rows, **settings)."""
    usual = {"quantization": "none", "epochs": 1, "batch_tokens": "auto"}
    return lambda base, rows, dev=(), **settings: new_run(base, rows, dev, **{**usual, **settings})


@pytest.mark.parametrize(("fmt", "pad"), [("chat", "<|im_end|>"), ("alpaca", "<|endoftext|>")])
def test_the_loss_is_on_the_answer_and_its_eos_alone(
    begin: Begin, tiny: Any, tiny_llama: Path, fmt: Any, pad: str
) -> None:
    rows = tiny.rows(9, seed=5)
    before = [("system", "Be brief."), ("user", "One?"), ("assistant", "1")]
    rows[3] |= {"turns": before, "output": "the last answer alone"}
    attempt = begin(tiny_llama, rows, format=fmt).attempt()
    template = load_template(tiny_llama, fmt)
    tokenizer = template.tokenizer
    tokenizer.pad_token = pad
    window = attempt.config.train.max_length
    kept_rows, _ = tokenise(attempt, template, attempt.path("data/train.jsonl"), window)
    job = made_training(tiny_llama, attempt.folder, kept_rows, attempt.config.train)
    trainer = Trainer(job, tokenizer)
    answers = set()
    for batch in trainer.get_train_dataloader():
        rows_of = [batch[name][0].split(batch["lengths"]) for name in ("input_ids", "labels")]
        for ids, labels in ((ids.tolist(), labels.tolist()) for ids, labels in zip(*rows_of, strict=True)):
            kept = [label for label in labels if label != -100]
            assert kept[-1] == tokenizer.eos_token_id
            answers.add(tokenizer.decode(kept))
            first = labels.index(kept[0])
            end = "<|im_start|>assistant\n" if fmt == "chat" else "### Response:\n"
            asked = tokenizer.decode(ids[:first])
            assert asked.endswith(end)
            assert labels[:first] == [-100] * first
            assert ("1<|im_end|>" in asked) == ("Be brief." in asked) == tokenizer.decode(kept).startswith("the last")
    assert answers == {row["output"] + "<|im_end|>" for row in rows}


def test_a_look_at_the_dev_loss_does_not_stop_the_training(begin: Begin, tiny: Any, tiny_llama: Path) -> None:
    rows = tiny.rows(64, seed=5)
    curves = {}
    for dev in (rows[32:51], rows[32:]):  # 19 are too few for a dev loss
        attempt = begin(tiny_llama, rows[:32], dev, quantization="nf4").attempt()
        adapter = train(attempt)
        curves[bool(adapter.dev_curve)] = [point.loss for point in adapter.loss_curve]
        shutil.rmtree(attempt.path(attempt.spec.checkpoints), ignore_errors=True)
    assert curves[True] == pytest.approx(curves[False])


def test_an_adapter_tells_how_its_training_went(begin: Begin, tiny: Any, tiny_llama: Path) -> None:
    rows = tiny.rows(60, seed=5)
    attempt = begin(tiny_llama, rows[:36], rows[36:], epochs=5, batch_size=16, batch_tokens=300).attempt()
    adapter = train(attempt)
    assert (adapter.optimizer_steps, adapter.format, adapter.quantization, adapter.device) == (
        15,
        "chat",
        "none",
        "cpu",
    )
    assert [point.step for point in adapter.loss_curve] == list(range(1, 16))
    assert [point.step for point in adapter.dev_curve] == list(range(1, 16)), "four an epoch, of three steps here"
    assert adapter.dev_curve[-1].loss < adapter.dev_curve[0].loss
    assert adapter.trained_tokens > 36 * 5 * 20
    assert torch.__version__.startswith(adapter.versions["torch"])
    assert {"peft", "transformers", "trl"} <= set(adapter.versions)
    assert sorted(path.name for path in attempt.folder.rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    attempt.write_progress()
    progress = json.loads((attempt.folder / "progress.json").read_text())
    assert (progress["done"], progress["total"], progress["phase"]) == (15, 15, "train")
    assert progress["tokens_per_second"] > 0
    assert progress["eta_seconds"] == 0
    assert progress["dev_loss"] == adapter.dev_curve[-1].loss
    curve = Curve.model_validate_json((attempt.folder / "curve.json").read_text())
    assert (curve.loss, curve.dev) == (adapter.loss_curve, adapter.dev_curve)


def test_automatic_settings_are_chosen_by_the_rows_and_the_base_logged_and_recorded(
    begin: Begin, tiny: Any, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = begin(tiny_llama, tiny.rows(12, seed=5), learning_rate="auto", epochs="auto").finish()
    assert (adapter.learning_rate, adapter.epochs) == (5e-4, 4)
    assert adapter.optimizer_steps == 8, "four passes of two steps"
    assert "learning rate 0.0005, 4 epochs" in capsys.readouterr().err


def test_rows_beyond_the_window_are_left_out_whole_and_counted_and_special_tokens_are_plain_text(
    begin: Begin, tiny: Any, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *tiny.rows(6, seed=5),
        {"instruction": "long", "input": "word " * 90, "output": "billing"},
        {"instruction": "x", "input": "bye<|im_end|>", "output": "billing"},
        {"instruction": "x", "input": "", "output": "billing<|im_start|>user"},
        {"instruction": "<|endoftext|>", "input": "", "output": "billing"},
    ]
    adapter, _ = begin(tiny_llama, rows, max_length=60).finish()
    assert (adapter.rows_too_long, adapter.optimizer_steps) == (1, 2)
    assert "train.jsonl: 9 rows kept; left out whole, never cut: 1 longer than 60 tokens" in capsys.readouterr().err


def test_nothing_left_to_train_on_is_refused_with_the_lengths(begin: Begin, tiny: Any, tiny_llama: Path) -> None:
    with pytest.raises(CannotTrain, match=r"2 training records have \d+ to \d+ tokens, and the window is 16"):
        begin(tiny_llama, tiny.rows(2, seed=5), max_length=16).finish()


def edit(name: str, **values: Any) -> Callable[[Path], object]:
    """Return what changes values of a JSON file of a model."""
    return lambda base: (base / name).write_text(json.dumps({**json.loads((base / name).read_text()), **values}))


def learn_a_word(base: Path) -> None:
    tokenizer: Any = load_tokenizer(base)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (edit("config.json", text_config={"max_position_embeddings": 20}), "the window is 20"),
        (learn_a_word, "the tokenizer has token"),
        (edit("tokenizer_config.json", eos_token=None), "no EOS"),
        (lambda base: (base / "chat_template.jinja").unlink(), r"train\.format is chat"),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused(
    begin: Begin, tiny_llama: Path, tmp_path: Path, spoil: Callable[[Path], object], problem: str
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    spoil(base)
    with pytest.raises(CannotTrain, match=problem):
        begin(base, [{"instruction": "zebra" * 5, "input": "", "output": "x"}], format="chat").finish()


def test_a_base_or_data_that_has_changed_is_refused(begin: Begin, tiny: Any, tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    attempt = begin(base, tiny.rows(9, seed=5)).attempt()
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(CannotTrain, match="has changed since the run began"):
        train(attempt)
    attempt = begin(tiny_llama, tiny.rows(9, seed=5)).attempt()
    (tmp_path / "data/train.jsonl").write_text("")
    with pytest.raises(CannotTrain, match="has changed since it was prepared"):
        train(attempt)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 3}, "lacks 9 weights that its config.json requires: model.layers.2."),
        ({"vocab_size": 840}, "ignore_mismatched_sizes"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    ],
)
def test_a_config_that_is_not_of_its_weights_is_refused_and_nothing_made_up(
    tiny_llama: Path, tmp_path: Path, change: dict[str, int], problem: str
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    edit("config.json", **change)(base)
    with pytest.raises(CannotTrain, match=problem):
        load_model(base, "cpu")


def test_a_training_that_moves_nothing_fails(begin: Begin, tiny: Any, tiny_llama: Path) -> None:
    with pytest.raises(CannotTrain, match="changed no weight"):
        begin(tiny_llama, tiny.rows(9, seed=5), learning_rate=1e-300).finish()


def test_a_stop_before_the_first_step_is_obeyed(begin: Begin, tiny: Any, tiny_llama: Path) -> None:
    attempt = begin(tiny_llama, tiny.rows(9, seed=5)).attempt()
    attempt.stop.set()
    with pytest.raises(Interrupted):
        train(attempt)


def test_a_long_curve_is_thinned_to_means() -> None:
    curve = thinned([(step, float(step)) for step in range(1, 1001)])
    assert len(curve) == 200
    assert (curve[0].step, curve[0].loss) == (5, 3.0)
    assert curve[-1].step == 1000
