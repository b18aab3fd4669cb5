"""
Compare the default learning rate and epochs of [train] with a grid, by the track's own metric on held-out records.

    python bench/defaults.py [FILE.jsonl ...] [--rows 48] [--heldout 48] [--characters 500] [--batch-size 4]
                             [--seed 1 2] [--results FILE]

Each task, by default the demo's messages, trains SmolLM2-135M-Instruct by the steps prepare, train, merge and evaluate
with each learning rate and number of epochs. Of a file only records with short texts are taken. What `--results` holds
is not measured again; without a seed it is only printed. Printed per setting, as means over the seeds: the score of the
metric that the track would have, the references' negative log-likelihood in nats per token, and the distance to the
best score. Then, of all pairs of models of a seed, those that the gate would promote but for its guards, and how many
of them the guard on likelihood (guards.nll) would block.

Measured on files of free text (ROUGE-L), entities as JSON (field F1) and two of labels (exact match), of 48 rows and 48
held-out records each, a batch of 4; score and likelihood as means of two seeds, rates across:

    task      epochs  2e-4          5e-4          1e-3          2e-3
    free text 1       30.1, 1.596   33.9, 1.557   34.6, 1.530   36.1, 1.555
              2       33.3, 1.559   37.9, 1.512   40.0, 1.512   38.2, 1.565
              4       37.0, 1.503   36.4, 1.585   35.1, 1.737   37.6, 1.801
    entities  1       12.9, 0.816   37.8, 0.540   42.5, 0.492   39.1, 0.480
              2       33.0, 0.562   41.3, 0.447   40.5, 0.416   43.6, 0.318
              4       40.3, 0.438   35.2, 0.353   37.7, 0.280   36.8, 0.254
    stars     1        0.0, 1.989   17.7, 0.638   22.9, 0.634   25.0, 0.615
              2       16.7, 0.650   22.9, 0.605   14.6, 0.640   17.7, 0.646
              4       21.9, 0.598   34.4, 0.540   25.0, 0.623   28.1, 0.617
    polarity  1       62.5, 0.549   66.7, 0.317   63.5, 0.362   65.6, 0.331
              2       59.4, 0.321   77.1, 0.235   84.4, 0.241   78.1, 0.276
              4       82.3, 0.228   76.0, 0.256   82.3, 0.242   81.2, 0.205

The defaults (5e-4, four epochs for so few rows) are 6 to 34 points above the former ones (2e-4, one epoch), and 3.6,
8.3, 0 and 8.3 below the grid's best, which differs from task to task. A score of 48 records has a standard error of up
to 7 points, so that the best of twelve is above the others by luck, and a difference of 1.5 points cannot be shown. Of
81 wins the guard on likelihood would have blocked one: of free text, four epochs at 2e-3 over one at 2e-4.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from daemon.cli.demo import demo_base
from daemon.system.threads import thread_variables
from pipeline import durable
from pipeline.artifacts import Adapter, Artifact, Drop, Evaluation, ModelRef, Role
from pipeline.config import EvaluateConfig, GateConfig, GuardConfig, RunConfig, TrainConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.decide import statistics
from pipeline.models.manifest import model_id
from pipeline.steps import BY_NAME
from tests.demo_data import make_data, write_rows

RATES, EPOCHS = (2e-4, 5e-4, 1e-3, 2e-3), (1.0, 2.0, 4.0)
#: The earlier defaults, then the rest; what is likely to be good first.
ORDER = (
    ((2e-4, 1.0), *((rate, 4.0) for rate in (1e-3, 5e-4, 2e-3, 2e-4))),
    *(
        tuple((rate, epochs) for rate in (1e-3, 2e-3, 5e-4, 2e-4) if (rate, epochs) != (2e-4, 1.0))
        for epochs in (2.0, 1.0)
    ),
)
Line = dict[str, Any]
Rows = Sequence[dict[str, str]]
ANSWER_CHARACTERS, ANSWER_TOKENS = 100, 40


@dataclass(frozen=True)
class Task:
    """One task's drops in `root`; once a model is evaluated also the base's predictions."""

    name: str
    root: Path
    base: Path
    base_id: str
    rows: dict[Role, int]

    def step(self, name: str, train: TrainConfig) -> Any:
        """Do a step in the folder `run`, or `prepared` for the first; publish and return its artifact."""
        folder = {step: "prepared" if step == "prepare" else "run" for step in BY_NAME}
        published = {step: f"{folder[step]}/{step}.json" for step in BY_NAME}
        (self.root / folder[name] / name).mkdir(parents=True)
        files = {role: self.root / "drops" / f"{role}.jsonl" for role in self.rows}
        spec = StepSpec(
            run=1,
            step=name,
            attempt=1,
            fence="",
            root=str(self.root),
            folder=f"{folder[name]}/{name}",
            checkpoints="run/checkpoints",
            predictions="predictions",
            env={},
            inputs={step: path for step, path in published.items() if (self.root / path).exists()},
            drops=tuple(
                Drop(
                    id=number,
                    sha256=durable.sha256_file(file),
                    name=file.name,
                    path=f"drops/{file.name}",
                    role=role,
                    rows=self.rows[role],
                    records=self.rows[role],
                )
                for number, (role, file) in enumerate(files.items(), 1)
            ),
            champion=ModelRef(model_id=self.base_id, path=str(self.base), generation=0),
            config=RunConfig(
                track="default",
                base_model=str(self.base),
                base_model_id=self.base_id,
                salt="",
                train=train,
                evaluate=EvaluateConfig(general=(), max_new_tokens=ANSWER_TOKENS),
                gate=GateConfig(on="pinned", min_records=10),
            ),
        )
        made: Artifact = BY_NAME[name].load()(Attempt(spec))
        durable.write_json(self.root / published[name], made.model_dump(mode="json"))
        return made


def main() -> int:
    """Train what the results lack, and print a table per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    for name, default in (("rows", 48), ("heldout", 48), ("characters", 500), ("batch-size", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    os.environ |= thread_variables()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # An import of the library of this name must not find bench/evaluate.py.
    sys.path.remove(str(Path(__file__).parent))
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
        results = asked.results or Path(folder) / "results.jsonl"
        tasks = [prepare(Path(folder), path, asked) for path in asked.files or [None]] if asked.seed else []
        for seed, part, task in itertools.product(asked.seed, ORDER, tasks):
            for rate, epochs in part:
                known = {(one["task"], one["seed"], one["rate"], one["epochs"]) for one in read(results)}
                if (task.name, seed, rate, epochs) not in known:
                    config = TrainConfig(learning_rate=rate, epochs=epochs, batch_size=asked.batch_size, seed=seed)
                    line = {"task": task.name, "seed": seed, "rate": rate, "epochs": epochs, **measure(task, config)}
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
        found = read(results)
    for name in dict.fromkeys(one["task"] for one in found):
        show([one for one in found if one["task"] == name], name)
    return 0


def prepare(folder: Path, path: Path | None, asked: argparse.Namespace) -> Task:
    """Prepare the first records of a file, or the demo's, that are short enough: the first ones are held out."""
    name = path.stem if path else "messages"
    root, base = folder / name, demo_base()
    (root / "drops").mkdir(parents=True)
    made = make_data(first=asked.rows, heldout=asked.heldout, second=1)
    records: Iterable[Any] = durable.read_jsonl(path) if path else [*made.heldout, *made.first]
    short = [
        one
        for one in records
        if len(one["instruction"] + one["input"]) <= asked.characters and len(one["output"]) <= ANSWER_CHARACTERS
    ]
    heldout = min(asked.heldout, len(short) // 2)
    parts: dict[Role, Rows] = {"heldout": short[:heldout], "train": short[heldout:][: asked.rows]}
    for role, rows in parts.items():
        write_rows(root / "drops" / f"{role}.jsonl", rows)
    task = Task(name, root, base, model_id(base), {role: len(rows) for role, rows in parts.items()})
    task.step("prepare", TrainConfig())
    return task


def measure(task: Task, config: TrainConfig) -> Line:
    """Train, merge and evaluate; return each record's score and likelihood, for the new model and the base."""
    began = time.process_time()
    adapter: Adapter = task.step("train", config)
    seconds = time.process_time() - began
    task.step("merge", config)
    found: Evaluation = task.step("evaluate", config)
    lines = list(durable.read_jsonl(task.root / found.folder / "records.jsonl"))
    cache = task.root / "predictions" / found.prediction_keys[task.base_id]
    if not cache.exists():
        cache.mkdir(parents=True)
        shutil.copy(task.root / "run" / "evaluate" / "predictions" / f"{cache.name}.jsonl", cache)
    shutil.rmtree(task.root / "run")
    return {
        "steps": adapter.optimizer_steps,
        "seconds": seconds,
        "records": {
            role: {
                one["id"]: (one[role]["scores"][found.metric], one[role]["nll_sum"], one[role]["nll_tokens"])
                for one in lines
            }
            for role in ("candidate", "champion")
        },
    }


def show(results: Sequence[Line], name: str) -> None:
    """Print a task's grid as means over its seeds, and how the likelihood guard takes its winners."""
    found: dict[tuple[float, float], list[Line]] = {}
    for one in results:
        found.setdefault((one["rate"], one["epochs"]), []).append(one)
    if not found:
        return
    base = mean([score(one, "champion") for one in results])
    table = Table(
        "",
        "seeds",
        "steps",
        "CPU s",
        "score",
        "nll",
        "to the best",
        title=f"{name}; the base: {base[0]:.1f}, {base[1]:.3f}",
    )
    best = max(mean([score(one) for one in lines])[0] for lines in found.values())
    for point, lines in sorted(found.items()):
        points, nll = mean([score(one) for one in lines])
        table.add_row(
            f"{point[0]:g} x {point[1]:g}",
            str(len(lines)),
            str(lines[0]["steps"]),
            f"{fmean(one['seconds'] for one in lines):.0f}",
            f"{points:.1f}",
            f"{nll:.3f}",
            f"{points - best:+.1f}",
        )
    Console(width=100).print(table)
    winners = [
        (new["rate"], new["epochs"], old["rate"], old["epochs"], score(new)[1] - score(old)[1])
        for new, old in itertools.permutations(results, 2)
        if new["seed"] == old["seed"] and wins(new, old)
    ]
    for *settings, change in winners:
        if change > GuardConfig().nll:
            print("the guard blocks", *settings, f"{change:+.3f}")
    print(f"{name}: {len(winners)} winners, {sum(one[-1] > GuardConfig().nll for one in winners)} of them blocked")


def score(result: Line, role: str = "candidate") -> tuple[float, float]:
    """Return a model's mean score in points, and the references' negative log-likelihood in nats per token."""
    scores, sums, tokens = zip(*result["records"][role].values(), strict=True)
    return 100 * fmean(scores), sum(sums) / sum(tokens)


def wins(new: Line, old: Line) -> bool:
    """Return whether the gate would promote one model over the other, guards aside."""
    changes = np.array(
        [one[0] - old["records"]["candidate"][name][0] for name, one in new["records"]["candidate"].items()]
    )
    gate = GateConfig()
    return bool(100 * changes.mean() >= gate.min_gain and statistics.one_sided_p(changes) <= gate.p_value)


def mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the means of both columns."""
    first, second = zip(*pairs, strict=True)
    return fmean(first), fmean(second)


def read(path: Path) -> list[Line]:
    """Return the results so far."""
    return list(durable.read_jsonl(path)) if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
