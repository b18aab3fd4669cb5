"""A training watched from outside: its dev loss, and its end where it went wrong, with the rows that it saw."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.records.heldout import dataset_hash
from pipeline.train.job import TokenRow
from pipeline.train.packing import pack
from pipeline.train.step import train
from pipeline.train.trainer import Trainer
from pipeline.train.watcher import Watcher
from tests.made_adapters import made_training
from tests.training_runs import TrainingRun

Row = dict[str, Any]


@pytest.fixture
def run(new_run: Callable[..., TrainingRun], tiny_llama: Path) -> TrainingRun:
    return new_run(tiny_llama, quantization="none", dropout=0.1)


def test_the_dev_loss_is_the_mean_over_all_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(4)
    rows = []
    for length in (1, 1, 1, 30, 2, 5, 1, 12, 3, 1, *range(1, 11)):
        ids = torch.randint(3, 259, (length + 4,), generator=dice).tolist()
        rows.append(TokenRow(ids, [0] * 4 + [1] * length))
    config = TrainConfig(quantization="none", rank=4, batch_size=4, dropout=0.9)
    job = replace(made_training(tiny_llama, tmp_path, rows[:4], config), dev=rows)
    trainer: Any = Trainer(job, load_tokenizer(tiny_llama))
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.05, generator=dice)
    found = trainer.dev_loss()
    trainer.model.eval()
    sums, means = [], []
    with torch.inference_mode():
        for row in rows:
            logits = trainer.model(**pack([torch.tensor(row.input_ids)])).logits[0, 3:-1].float()
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.input_ids[4:]), reduction="none")
            sums.append(losses.sum().item())
            means.append(losses.mean().item())
    assert found == pytest.approx(sum(sums) / sum(sum(row.completion_mask) for row in rows), rel=1e-5)
    assert found != pytest.approx(sum(means) / len(means), rel=1e-3)


# What went wrong, and where ------------------------------------------------------------------------------------------


def poisoned(base: Path, target: Path, rows: Sequence[Row], line: int) -> Path:
    """Return a base that gives no number for a token which only the row of `line` has."""
    tokenizer = load_tokenizer(base)
    ids = [set(tokenizer(row["input"])["input_ids"]) for row in rows]
    (token, *_) = ids[line - 1].difference(*ids[: line - 1], *ids[line:])
    model: Any = load_model(base, "cpu")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.model.embed_tokens.weight.data[token] = math.nan
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def test_a_loss_that_is_no_number_names_its_step_and_its_records(run: TrainingRun, tmp_path: Path) -> None:
    path = run.root / "data/train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[16]["input"] += " ~@~"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.dataset = run.dataset.model_copy(update={"dataset_sha256": dataset_hash(run.root / "data")})
    run.base = poisoned(run.base, tmp_path / "base", rows, line=17)
    with pytest.raises(CannotTrain) as caught:
        train(run.attempt())
    words = caught.value.message
    told, _, named = words.partition("; its records are lines ")
    lines = [int(number) for number in named.removesuffix(" of train.jsonl").split(", ")]
    assert 17 in lines
    assert len(lines) == 8
    assert told.startswith("training diverged: the loss at step ")
    assert told.endswith(" is nan")
    assert f"sed -n '{''.join(f'{line}p;' for line in lines)}' {path}" in caught.value.hint


def test_a_gradient_that_is_not_finite_ends_the_training_though_the_loss_is(run: TrainingRun) -> None:
    rows = [TokenRow([3], [1], line) for line in range(1, 51)]
    watch: Any = Watcher(run.attempt(), made_training(run.base, run.root, rows, TrainConfig(batch_size=12)))
    state = SimpleNamespace(log_history=[], num_input_tokens_seen=0, max_steps=90, global_step=2)
    watch.on_train_begin(None, state, None)
    with pytest.raises(CannotTrain, match=r"the gradient's norm at step 2 is inf; its records are lines"):
        watch.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": math.inf})
