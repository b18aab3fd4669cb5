"""
Compare the methods of [train]: what each gains on the task, forgets of everything else, and takes of time and memory.

    python bench/methods.py [FILE.jsonl ...] [--rows 64] [--heldout 60] [--epochs 1] [--seed 42 ...] [--base FOLDER]
                            [--method lora ...] [--learning-rate RATE]

Each method trains SmolLM2-135M-Instruct on the same rows of the demo, or of Alpaca files, by the train step in a
process of its own, and is merged by the merge step; what is looked at is the merged folder, as it would serve. `rslora`
is `lora` with that setting. Printed are the processor's time of the training, which other work on the machine disturbs
least; the process's largest memory, and what was estimated; the weights that were trained; the dev loss at the end,
before the merge; the mean loss of the held-out answers after it, and how many are the likeliest at each of their
tokens; and forgetting as in bench/trained.py: the rise of the loss on Python's language reference, in nats per token.
The learning rates are the settings' own unless one is given.

Measured on two cores with avx512_bf16, one thread, shared with other work, 128 rows (32 steps), seeds 42, 43, 44; the
base: task loss 5.85, none exact. Two numbers are the least and the most of the three.

    method     rate   CPU s      peak     estimated   trained   task loss     exact        forgetting       drift
    lora       2e-4   58-59      1.6 GB   1.5 GB      4.9 M     1.02-1.03     3 %          +0.013, +0.018   0.06-0.08
    lora       8e-4   55         1.6 GB   1.5 GB      4.9 M     0.08          92 %         +0.332           0.03
    rslora     2e-4   55-58      1.6 GB   1.5 GB      4.9 M     0.12-0.13     82-85 %      +0.156, +0.178   0.01-0.03
    dora       2e-4   102-105    1.8 GB   1.5 GB      5.0 M     0.83-0.86     3 %          +0.015, +0.019   0.02-0.03
    galore     2e-4   77-85      3.3 GB   3.1 GB      106.2 M   0.15-0.17     78-85 %      +0.076, +0.089   0.06-0.11
    spectrum   1e-4   58-63      2.0 GB   2.0 GB      28.3 M    0.44-0.51     28-35 %      +0.002, +0.004   0.05-0.10
    full       1e-4   80-85      5.1 GB   4.6 GB      134.5 M   0.03-0.07     93-98 %      +0.108, +0.112   0.04-0.09

With 64 rows (16 steps) at 2e-5 `full` came to 5.80 and `galore` to 5.85.

116 rows (29 steps) of PAWS (do two sentences mean the same: yes or no), seed 42; the base: task loss 1.67, none exact:

    method     rate   CPU s      peak     estimated   trained   task loss     exact        forgetting       drift
    lora       2e-4   82         1.9 GB   1.8 GB      4.9 M     0.41          53 %         -0.007           0.29
    rslora     2e-4   90         1.9 GB   1.8 GB      4.9 M     0.37          53 %         -0.005           0.01
    dora       2e-4   137        2.5 GB   1.8 GB      5.0 M     0.38          52 %         -0.008           0.04
    galore     2e-4   114        3.5 GB   3.5 GB      106.2 M   0.36          38 %         +0.004           0.01
    spectrum   1e-4   94         2.2 GB   2.4 GB      28.3 M    0.37          32 %         -0.007           0.06
    full       1e-4   119        5.4 GB   5.0 GB      134.5 M   0.35          50 %         +0.021           0.01

All learned to say yes or no there, none to tell which. On a GPU it was not run.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from daemon.cli.demo import demo_base
from daemon.system.threads import thread_variables
from pipeline import durable
from pipeline.artifacts import Adapter, Model, ModelRef
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.models.manifest import model_id
from pipeline.words import size_words
from tests.demo_data import make_data

# A script finds only the files beside it.
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.trained import DEV_ROWS, look, passages, tokenise, write_data

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "rslora": {"method": "lora", "rslora": True},
    "galore": {},
    "spectrum": {},
    "full": {},
}
Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is asked."""

    train: Rows
    heldout: Rows


def main() -> int:
    """Measure and print; exit 1 if a method learned nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    for name, default in (("rows", 64), ("heldout", 60), ("batch-size", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, nargs="+", default=[42])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--base", type=Path)
    asked = parser.parse_args()
    os.environ |= thread_variables()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    common = {"epochs": asked.epochs, "batch_size": asked.batch_size, "max_length": 512, "format": "chat"}
    if asked.learning_rate:
        common["learning_rate"] = asked.learning_rate
    trainings = [
        (
            name,
            TrainConfig.model_validate(
                {"method": name, "quantization": "none", **common, **METHODS[name], "seed": seed}
            ),
        )
        for name in asked.method
        for seed in asked.seed
    ]
    return measure(asked.base or demo_base(), trainings, data_of(asked.files, asked.rows, asked.heldout))


def data_of(files: Sequence[Path], rows: int, heldout: int) -> Data:
    """Return the demo's rows, or those of files: the last are held out."""
    if not files:
        made = make_data(first=rows + DEV_ROWS, heldout=heldout, second=1)
        return Data(made.first, made.heldout)
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [json.loads(line) for line in lines][: rows + DEV_ROWS + heldout]
    return Data(found[:-heldout], found[-heldout:])


def measure(base: Path, trainings: Sequence[tuple[str, TrainConfig]], data: Data) -> int:
    """Train and merge each, and print one table."""
    from pipeline.models.generation import load_template  # noqa: PLC0415 - after the environment is set
    from pipeline.models.loading import load_model  # noqa: PLC0415

    template = load_template(base, "chat")
    task, general = [tokenise(template, record) for record in data.heldout], list(passages(template.tokenizer))
    before = look(load_model(base, "cpu"), task, general)
    columns = (
        "",
        "seed",
        "rate",
        "CPU s",
        "peak",
        "estimated",
        "trained",
        "dev",
        "task loss",
        "exact",
        "forgetting",
    )
    table = Table(*columns, title=f"{len(data.train) - DEV_ROWS} rows; load {os.getloadavg()}")
    table.add_row("base", *[""] * 7, f"{before.task:.3f}", f"{before.exact:.1f} %", "", "")
    learned = True
    for name, config in trainings:
        with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
            adapter, model, seconds = train_and_merge(Path(folder), base, config, data.train)
            after = look(load_model(Path(folder) / model.folder, "cpu"), task, general)
        row = (
            name,
            str(config.seed),
            f"{adapter.learning_rate:g}",
            f"{seconds:.0f}",
            size_words(adapter.peak_memory_bytes),
            size_words(sum(adapter.estimated_memory.values())),
            f"{adapter.trainable_parameters / 1e6:.1f} M",
            f"{adapter.dev_curve[-1].loss:.3f}",
            f"{after.task:.3f}",
            f"{after.exact:.1f} %",
            f"{after.general - before.general:+.3f}",
        )
        table.add_row(*row)
        print(*row, sep="\t", file=sys.stderr)
        learned = learned and after.task < before.task
    Console(width=132).print(table)
    return 0 if learned else 1


def train_and_merge(root: Path, base: Path, config: TrainConfig, rows: Rows) -> tuple[Adapter, Model, float]:
    """Do both steps; return what they made, and the processor's seconds of the first."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    adapter = train(root, base, config, rows)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    durable.write_json(root / "train.json", adapter.model_dump(mode="json"))
    inputs = {"prepare": "prepare.json", "train": "train.json"}
    model = Model.model_validate(step(spec(root, base, config, step="merge", folder="merge-1", inputs=inputs)))
    return adapter, model, ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


def train(root: Path, base: Path, config: TrainConfig, rows: Rows) -> Adapter:
    """Train on rows, the last of which are the dev rows."""
    write_data(root, rows)
    inputs = {"prepare": "prepare.json"}
    return Adapter.model_validate(step(spec(root, base, config, step="train", folder="train-1", inputs=inputs)))


def spec(root: Path, base: Path, config: TrainConfig, **own: Any) -> StepSpec:
    """Return what a step of a run in `root` is told."""
    identity = model_id(base)
    return StepSpec(
        run=1,
        attempt=1,
        fence="",
        root=str(root),
        checkpoints="checkpoints",
        predictions="predictions",
        env={},
        drops=(),
        champion=ModelRef(model_id=identity, path=str(base), generation=0),
        config=RunConfig(track="default", base_model=str(base), base_model_id=identity, salt="", train=config),
        **own,
    )


def step(told: StepSpec) -> Any:
    """Do a step in a process of its own; return its artifact."""
    place = Path(told.root) / told.folder
    place.mkdir()
    durable.write_json(place / SPEC_NAME, told.model_dump(mode="json"))
    command = [sys.executable, "-P", "-m", "pipeline", told.step, str(place / SPEC_NAME)]
    with (place / "log").open("wb") as log:
        subprocess.run(command, check=False, stdout=log, stderr=log)
    result = StepResult.model_validate(durable.read_json(place / RESULT_NAME))
    if result.artifact is None:
        sys.exit(f"{told.step}: {result.error}")
    return result.artifact


if __name__ == "__main__":
    sys.exit(main())
