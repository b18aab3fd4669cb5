"""Train SmolLM2 on a few rows by the train step, and measure a model's losses on the task and on other text."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from pipeline import durable
from pipeline.artifacts import Adapter, Dataset, ModelRef
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.models.manifest import model_id
from pipeline.models.template import Template, fold, single_turn
from pipeline.prepare import start
from pipeline.records.heldout import dataset_hash, prompt_id
from tests.demo_data import write_rows

DEV_ROWS = 24
PASSAGES, PASSAGE_TOKENS = 24, 128

Tokens = tuple[list[int], int]
"""The tokens of a text, and at which of them what is measured begins."""


@dataclass(frozen=True)
class Measured:
    """A model on the held-out answers and on general text; losses in nats per token."""

    task: float
    exact: float
    """Per cent of the answers."""
    general: float


def train(root: Path, base: Path, config: TrainConfig, rows: Sequence[dict[str, str]]) -> tuple[Adapter, float]:
    """Train as the step does, the last rows being the dev rows; return its artifact and the processor's seconds."""
    from pipeline.train.step import train as step  # noqa: PLC0415

    write_data(root, rows, config.general_rows)
    identity = model_id(base)
    (root / "train-1").mkdir()
    spec = StepSpec(
        run=1,
        step="train",
        attempt=1,
        fence="",
        root=str(root),
        folder="train-1",
        checkpoints="checkpoints",
        predictions="predictions",
        env={},
        inputs={"prepare": "prepare.json"},
        drops=(),
        champion=ModelRef(model_id=identity, path=str(base), generation=0),
        config=RunConfig(track="default", base_model=str(base), base_model_id=identity, salt="", train=config),
    )
    began = time.process_time()
    adapter = step(Attempt(spec))
    return adapter, time.process_time() - began


def write_data(root: Path, rows: Sequence[dict[str, str]], general: float = 0.0) -> None:
    """
    Write what `prepare` would leave in `root`: the rows, of which the last are the dev rows, and its artifact.

    `general` is the share of the training rows that are general ones.
    """
    (root / "data").mkdir()
    count = round((len(rows) - DEV_ROWS) * general / (1 - general))
    built_in = cycle(durable.read_jsonl(start.GENERAL_ROWS))
    added = [{"id": prompt_id(row["instruction"], ""), "input": "", **row} for row in islice(built_in, count)]
    for name, part, more in (("train", rows[:-DEV_ROWS], added), ("dev", rows[-DEV_ROWS:], [])):
        own = [{"id": str(number), **row} for number, row in enumerate(part)]
        write_rows(root / "data" / f"{name}.jsonl", [*own, *more])
    dataset = Dataset(
        folder="data",
        train_rows=len(rows) - DEV_ROWS,
        dev_rows=DEV_ROWS,
        heldout_rows=0,
        heldout_groups=0,
        heldout_pinned=False,
        heldout_version="",
        dataset_sha256=dataset_hash(root / "data"),
        duplicates=0,
        replaced=0,
        removed_heldout=0,
        metric="exact_match",
        max_new_tokens=8,
    )
    durable.write_json(root / "prepare.json", dataset.model_dump(mode="json"))


def tokenise(template: Template, record: dict[str, str]) -> Tokens:
    """Return a record as the train step tokenises it."""
    turns = single_turn(fold(record["instruction"], record.get("input", "")), record["output"])
    prompt = template.prompt(turns[:-1])
    return [*prompt, *template.target(turns)], len(prompt)


def passages(tokenizer: Any) -> Iterator[Tokens]:
    """Yield the beginnings of chapters of Python's language reference."""
    texts = (tokenizer(topics[name], add_special_tokens=False)["input_ids"] for name in sorted(topics))
    long = (ids[:PASSAGE_TOKENS] for ids in texts if len(ids) >= PASSAGE_TOKENS)
    yield from ((ids, 1) for ids, _ in zip(long, range(PASSAGES), strict=False))


def look(model: Any, task: Sequence[Tokens], general: Sequence[Tokens]) -> Measured:
    """Return a model's losses on both, and the share of the answers that it would give."""
    losses, right = score(model, task)
    return Measured(losses, 100 * right, score(model, general)[0])


def score(model: Any, texts: Sequence[Tokens]) -> tuple[float, float]:
    """Return the mean loss of the measured tokens, and the share of texts that greedy decoding would reproduce."""
    import torch  # noqa: PLC0415

    total, tokens, right = 0.0, 0, 0
    with torch.inference_mode():
        for ids, start in texts:
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float()
            wanted = torch.tensor(ids[start:])
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(wanted)
            right += int((logits.argmax(-1) == wanted).all())
    return total / tokens, right / len(texts)
