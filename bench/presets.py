"""
Measure what each preset of [train] gains on the task and forgets of everything else, beside the base model.

    python bench/presets.py [--rows 64] [--heldout 60] [--batch-size 4] [--base FOLDER] [--seed 42]

Each preset trains SmolLM2-135M-Instruct on the same rows of the demo, through the train step as it is. Printed are its
processor time, which other work on the machine disturbs least; the mean loss of the held-out answers, and how many are
the likeliest at each of their tokens, which is what greedy decoding would say; and the loss on text that has nothing to
do with the task, Python's own language reference. Forgetting is that loss after the training minus before, in nats a
token.

Measured on two cores with avx512_bf16, shared with other work (load 12; in all 200 s of the processor's time), bf16:

    preset     CPU s   steps   task loss   exact    forgetting
    base                       5.850        0.0 %
    fast       25      16      1.124        5.0 %   +0.012
    balanced   25      16      2.975        0.0 %   -0.003
    quality    78      48      0.293       61.7 %   +0.056   (the adapter of step 44, which had the lowest dev loss)

So `fast` gets further in the same steps, and no step is faster. An adapter on the MLP alone took 23 s instead of 24,
and was at 1.56 under a learning rate of 5e-4: that saves nothing here, and is no preset. On a GPU it was not measured.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from daemon.cli.demo.command import demo_base
from daemon.cli.demo.data import make_data, write_rows
from pipeline import durable
from pipeline.artifacts import Adapter, Dataset, ModelRef
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.models.manifest import model_id
from pipeline.models.template import Template, fold, single_turn
from pipeline.prepare.start import mix_in_general
from pipeline.records.heldout import dataset_hash

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


def main() -> int:
    """Measure and print; exit 1 if a preset learned nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 64), ("heldout", 60), ("batch-size", 4), ("seed", 42)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--base", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    names = get_args(TrainConfig.model_fields["preset"].annotation)
    presets = {
        name: TrainConfig(
            preset=name,
            format="chat",
            quantization="none",
            batch_size=asked.batch_size,
            max_length=256,
            seed=asked.seed,
        )
        for name in names
    }
    return measure(asked.base or demo_base(), presets, asked.rows, asked.heldout)


def measure(base: Path, presets: dict[str, TrainConfig], rows: int, heldout: int) -> int:
    """Train each preset on the demo's first `rows` rows and print one table."""
    from peft import PeftModel  # noqa: PLC0415 - after the environment is set

    from pipeline.models.generation import load_template  # noqa: PLC0415
    from pipeline.models.loading import load_model  # noqa: PLC0415

    template = load_template(base, "chat")
    data = make_data(first=rows + DEV_ROWS, heldout=heldout, second=1)
    task = [tokenise(template, record) for record in data.heldout]
    general = list(passages(template.tokenizer))
    before = look(load_model(base, "cpu"), task, general)
    columns = ("", "CPU s", "steps", "task loss", "exact", "forgetting")
    table = Table(*columns, title=f"{rows} rows; load {os.getloadavg()}")
    table.add_row("base", "", "", f"{before.task:.3f}", f"{before.exact:.1f} %", "")
    learned = True
    for name, config in presets.items():
        with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
            adapter, seconds = train(Path(folder), base, config, data.first)
            model: Any = PeftModel.from_pretrained(load_model(base, "cpu"), str(Path(folder) / adapter.folder))
            after = look(model.eval(), task, general)
        forgot = f"{after.general - before.general:+.3f}"
        numbers = (f"{seconds:.0f}", str(adapter.optimizer_steps), f"{after.task:.3f}")
        table.add_row(name, *numbers, f"{after.exact:.1f} %", forgot)
        learned = learned and after.task < before.task
    Console(width=120).print(table)
    return 0 if learned else 1


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
    for name, part in (("train", rows[:-DEV_ROWS]), ("dev", rows[-DEV_ROWS:])):
        write_rows(root / "data" / f"{name}.jsonl", [{"id": str(number), **row} for number, row in enumerate(part)])
    mix_in_general(root / "data", len(rows) - DEV_ROWS, general, 0.5)
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
    """Return the mean loss of what is measured, and the share of texts all of whose measured tokens are likeliest."""
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


if __name__ == "__main__":
    sys.exit(main())
