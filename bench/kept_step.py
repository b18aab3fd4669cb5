"""
Compare rules for the step whose weights a training keeps: the last step, or one that the dev rows choose.

    python bench/kept_step.py [FILE.jsonl ...] [--rows 48] [--dev 100] [--heldout 100] [--epochs 4] [--points 4]
                              [--seed 42 43 44] [--base FOLDER] [--out FILE] [--read FILE]

Each task trains SmolLM2-135M-Instruct once per seed by the train step. At each of `--points` measurements the loss of
every dev and held-out answer is noted, and whether all of its tokens are the likeliest. All rules are compared on the
same trainings, by the held-out answers at the step that each rule keeps. Tasks are the demo's messages, the same with
every fifth answer wrong, as people's labels are, and each Alpaca file. `--read` prints the measurements in `--out`.

Nine trainings, of 150 to 200 s of a shared processor each; the files were wnut17's entities as JSON, short texts, and
Amazon's and Yelp's reviews, positive or negative, cut to 22 words. Seeds 42 to 44 of both, 42 of the
messages, 42 and 44 of those with wrong answers. Held-out answers that are right, in per cent, and their loss:

    dev rows   rule                messages      a fifth wrong   entities      polarity      all
               last step           88.0  0.094   58.0  0.253     25.3  0.369   81.0  0.277   58.1  0.282
    20         lowest loss         87.6  0.101   55.8  0.261     27.5  0.363   79.4  0.275   57.8  0.282
    20         loss, rise > 1 se   88.0  0.094   58.0  0.253     25.7  0.368   81.0  0.277   58.2  0.282
    20         metric              87.6  0.101   55.4  0.261     39.4  0.464   79.1  0.282   61.6  0.318
    50         lowest loss         88.0  0.094   57.5  0.256     27.5  0.364   78.8  0.277   58.0  0.281
    50         loss, rise > 1 se   88.0  0.094   58.0  0.253     26.3  0.366   81.0  0.276   58.4  0.281
    50         metric              87.0  0.111   54.5  0.269     40.3  0.491   79.2  0.287   61.6  0.332
    100        lowest loss         88.0  0.094   58.0  0.253     27.3  0.362   81.0  0.275   58.8  0.279
    100        loss, rise > 1 se   88.0  0.094   58.0  0.253     27.3  0.362   81.0  0.277   58.8  0.280
    100        metric              88.0  0.094   55.0  0.257     41.7  0.471   81.0  0.275   62.9  0.316

No loss rose by more than two standard errors. For the entities the metric keeps an early model that answers [] to every
text: right for 39 to 45 of 100 texts; of the other texts it has none right, the last models 10 to 19.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from daemon.cli.demo import demo_base
from daemon.system.threads import thread_variables
from pipeline.config import TrainConfig
from tests.demo_data import TEAMS, make_data

# A script finds only the files beside it.
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import trained
from bench.trained import Tokens, tokenise, train

DEV_SIZES = (20, 50, 100)
TOGETHER = 16
Rows = Sequence[dict[str, str]]
Look = list[tuple[float, int, bool]]
"""Per row: the answer's loss in nats, its number of tokens, and whether all are the likeliest."""
Points = list[Look]
Rule = Callable[[Points], int]


@dataclass(frozen=True)
class Sizes:
    """How many rows a task has."""

    train: int
    dev: int
    heldout: int

    @property
    def total(self) -> int:
        """All rows."""
        return self.train + self.dev + self.heldout


def main() -> int:
    """Measure, or read earlier measurements, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    for name, default in (("rows", 48), ("dev", 100), ("heldout", 100), ("points", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", type=Path)
    asked = parser.parse_args()
    os.environ |= thread_variables()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if asked.read:
        compare([json.loads(line) for line in asked.read.read_text(encoding="utf-8").splitlines()])
        return 0
    sizes = Sizes(asked.rows, asked.dev, asked.heldout)
    noted = []
    for seed in asked.seed:
        for name, rows in tasks(asked.files, sizes, seed):
            config = TrainConfig(
                format="chat",
                quantization="none",
                max_length=512,
                processes=1,
                batch_size=4,
                epochs=asked.epochs,
                learning_rate=asked.learning_rate,
                seed=seed,
            )
            began = time.process_time()
            points = measure(asked.base or demo_base(), config, rows, sizes, asked.points)
            noted.append({"task": name, "seed": seed, "dev": sizes.dev, "points": points})
            print(
                f"{name}, seed {seed}: {time.process_time() - began:.0f} s of the processor",
                file=sys.stderr,
                flush=True,
            )
            if asked.out:
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(noted[-1]) + "\n")
    compare(noted)
    return 0


def tasks(files: Sequence[Path], sizes: Sizes, seed: int) -> list[tuple[str, Rows]]:
    """Return the name and the rows of each task, in an order that follows from the seed."""
    rng = random.Random(seed)
    clean = list(make_data(first=sizes.total, heldout=1, second=1).first)
    teams = sorted(TEAMS.values())
    noisy = [{**row, "output": rng.choice(teams)} if rng.random() < 1 / 4 else row for row in clean]
    found = [("messages", clean), ("messages, a fifth wrong", noisy)]
    lines = ((file.stem, file.read_text(encoding="utf-8").splitlines()) for file in files)
    found += [(name, [json.loads(line) for line in those]) for name, those in lines]
    for _, rows in found:
        rng.shuffle(rows)
    return [(name, rows[: sizes.total]) for name, rows in found]


def measure(base: Path, config: TrainConfig, rows: Rows, sizes: Sizes, points: int) -> Points:
    """Train on the first rows; return each measurement of the other rows, the dev rows first."""
    import torch  # noqa: PLC0415 - after the environment is set

    from pipeline.models.generation import load_template  # noqa: PLC0415
    from pipeline.train import trainer  # noqa: PLC0415

    template = load_template(base, "chat")
    texts = [tokenise(template, row) for row in rows[sizes.train :]]
    found: Points = []

    def dev_loss(trainer: Any) -> float:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            trainer.model.eval()
            found.append(look(trainer.model.get_base_model(), texts))
        return loss_of(found[-1][: sizes.dev])

    # Four measurements an epoch take too long here. The step measures only if it has dev rows; they are not used.
    share = patch.object(trainer, "_DEV_SHARE", float(config.epochs) / points)
    measured = patch.object(trainer.Trainer, "dev_loss", dev_loss)
    with share, measured, tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
        train(Path(folder), base, config, rows[: sizes.train + trained.DEV_ROWS])
    return found


def look(model: Any, texts: Sequence[Tokens]) -> Look:
    """Return the loss of each answer, its tokens, and whether all are the likeliest."""
    import torch  # noqa: PLC0415

    from pipeline.train.packing import pack  # noqa: PLC0415

    found: Look = []
    for first in range(0, len(texts), TOGETHER):
        batch = texts[first : first + TOGETHER]
        # The trainer's attention takes records end to end.
        hidden = model.base_model(**pack([torch.tensor(ids) for ids, _ in batch]), use_cache=False).last_hidden_state[0]
        for (ids, start), states in zip(batch, hidden.split([len(ids) for ids, _ in batch]), strict=True):
            wanted = torch.tensor(ids[start:])
            logits = model.get_output_embeddings()(states[start - 1 : -1]).float()
            nll = float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            found.append((nll, len(wanted), bool((logits.argmax(-1) == wanted).all())))
    return found


def loss_of(rows: Look) -> float:
    """Return the loss in nats per token."""
    return sum(nll for nll, _, _ in rows) / sum(tokens for _, tokens, _ in rows)


def exact_of(rows: Look) -> float:
    """Return the share of right answers."""
    return sum(right for _, _, right in rows) / len(rows)


def last(points: Points) -> int:
    """Keep the last step."""
    return len(points) - 1


def lowest(points: Points) -> int:
    """Keep the lowest dev loss."""
    return min(range(len(points)), key=lambda point: loss_of(points[point]))


def beyond(errors: float) -> Rule:
    """Keep the lowest dev loss if the last is more than `errors` standard errors above it, paired by row."""

    def rule(points: Points) -> int:
        best = lowest(points)
        pairs = list(zip(points[-1], points[best], strict=True))
        tokens = sum(one[1] for one, _ in pairs)
        rise = sum(one[0] - other[0] for one, other in pairs) / tokens
        # The standard error of a ratio of sums (Cochran 1977).
        squares = sum((one[0] - other[0] - rise * one[1]) ** 2 for one, other in pairs)
        error = math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / tokens
        return best if rise > errors * error else last(points)

    return rule


def metric(points: Points) -> int:
    """Keep the most right answers on the dev rows; of equals the latest."""
    return max(range(len(points)), key=lambda point: (exact_of(points[point]), point))


RULES: dict[str, Rule] = {
    "last step": last,
    "lowest loss": lowest,
    "loss, rise > 1 se": beyond(1),
    "loss, rise > 2 se": beyond(2),
    "metric": metric,
}


def compare(noted: Sequence[dict[str, Any]]) -> None:
    """Print the held-out numbers of each rule, per task and number of dev rows."""
    names = list(dict.fromkeys(one["task"] for one in noted))
    table = Table("dev rows", "rule", *names, "all", title="held-out: exact in %, loss in nats per token")
    for size in DEV_SIZES:
        for rule, choose in RULES.items():
            if choose is last and size != DEV_SIZES[0]:
                continue
            kept = {name: [kept_by(choose, one, size) for one in noted if one["task"] == name] for name in names}
            cells = [mean(values) for values in (*kept.values(), [value for of in kept.values() for value in of])]
            words = (f"{exact:.1f}  {loss:.3f}" for exact, loss in cells)
            table.add_row("" if choose is last else str(size), rule, *words)
    Console(width=150).print(table)
    for one in noted:
        words = (
            f"{loss_of(rows[one['dev'] :]):.3f} {100 * exact_of(rows[one['dev'] :]):.0f} %" for rows in one["points"]
        )
        print(one["task"], one["seed"], *words, sep="  ")


def kept_by(choose: Rule, one: dict[str, Any], size: int) -> tuple[float, float]:
    """Return the rule's held-out exact match and loss, averaged over disjoint groups of `size` dev rows."""
    parts = [slice(first, first + size) for first in range(0, one["dev"] - size + 1, size)]
    kept = [one["points"][choose([rows[part] for rows in one["points"]])][one["dev"] :] for part in parts]
    return mean([(100 * exact_of(rows), loss_of(rows)) for rows in kept])


def mean(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the means of both."""
    return sum(one for one, _ in values) / len(values), sum(other for _, other in values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
