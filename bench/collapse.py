"""
Measure whether a model that was trained on labels still answers anything else, and what general rows do about it.

    python bench/collapse.py [demo FILE.jsonl ...] [--share 0 0.2] [--rows 160] [--heldout 60] [--seed 42]
                             [--learning-rate 5e-4] [--batch-size 4] [--answers ours] [--say]

Each task (the demo's, or a file's rows, of which the last are held out) trains SmolLM2-135M-Instruct by the train step,
once with each share of general rows (`train.general_rows`), mixed in as `prepare` does it. Then the 38 questions of the
built-in suite are answered greedily, as in `evaluate`. Printed are the loss of the held-out answers and the share of
them whose tokens are all the likeliest; the number of questions with a right answer; and the numbers with a label, an
empty or a far shorter answer than the base model's, with the p-value (the card warns at .01 or below). With `--answers
base` the general rows have the base model's own answers instead of ours. `--say` prints the answers.

Measured on two cores shared with other work, one thread, seed 42; the base answers 25 of 38 questions right:

    task              share   rows + general   steps   task loss   exact    right   label   empty   short   p
    demo              0       160              40      0.094       90.0 %   5       8       0       21      2e-09
    demo              0.1     160 + 18         45      0.085       85.0 %   20      4       0       12      2e-05
    demo              0.2     160 + 40         50      0.139       82.5 %   31      0       0       1       0.5
    amazon_polarity   0       116              29      0.193       85.0 %   25      0       0       8       0.004
    yelp_stars        0       72               18      0.627       2.5 %    18      1       1       12      6e-05
    alpaca_en_demo    0       56               14      1.562       0.0 %    29      0       0       0       1

The first and the fourth are of 60 held-out records, the last of 10, the others of 40. Many of the questions that a
fifth of general rows brings back have the form of some of these: other capitals, other sums.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from daemon.cli.demo import demo_base
from daemon.system.threads import thread_variables
from pipeline import durable
from pipeline.config import TrainConfig
from pipeline.decide.statistics import mcnemar_exact
from pipeline.evaluate.suites import QUESTIONS, Item, read_suite
from pipeline.metrics.degenerate import COLLAPSED, collapsed
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import AskedModel, Decoding
from pipeline.models.template import single_turn
from pipeline.prepare import start
from tests.demo_data import write_rows

# A script finds only the files beside it.
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.methods import Data, data_of
from bench.trained import DEV_ROWS, score, tokenise, train

ASKED = read_suite(QUESTIONS).items


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["demo"])
    for name, default in (("rows", 160), ("heldout", 60), ("batch-size", 4), ("seed", 42)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--answers", choices=("ours", "base"), default="ours")
    parser.add_argument("--say", action="store_true")
    asked = parser.parse_args()
    os.environ |= thread_variables()
    base = demo_base()
    plain = open_base(base)
    usual = answer(plain, [item.question for item in ASKED])
    if asked.answers == "base":
        start.GENERAL_ROWS = own_answers(plain, start.GENERAL_ROWS)
    generation.close_model(plain)
    columns = ("task", "share", "rows", "general", "steps", "CPU s", "task loss", "exact", "right", *COLLAPSED, "p")
    table = Table(*columns, title=f"base: {sum(map(right, ASKED, usual))} of {len(ASKED)} right")
    for task, share in itertools.product(asked.tasks, asked.share):
        data = data_of([] if task == "demo" else [Path(task)], asked.rows, asked.heldout)
        config = TrainConfig(
            format="chat",
            quantization="none",
            learning_rate=asked.learning_rate,
            epochs=1,
            batch_size=asked.batch_size,
            max_length=512,
            seed=asked.seed,
            general_rows=share,
        )
        row = measure(base, config, data, usual, say=asked.say)
        table.add_row(Path(task).stem, f"{share:g}", *row)
        print(Path(task).stem, share, *row, sep="\t", file=sys.stderr, flush=True)
    Console(width=132).print(table)
    return 0


def measure(base: Path, config: TrainConfig, data: Data, usual: Sequence[str], *, say: bool) -> list[str]:
    """Train, ask, and return what one line says."""
    from peft import PeftModel  # noqa: PLC0415 - after the environment is set

    rows = len(data.train) - DEV_ROWS
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
        adapter, seconds = train(Path(folder), base, config, data.train)
        general = len((Path(folder) / "data/train.jsonl").read_text(encoding="utf-8").splitlines()) - rows
        over = open_base(base)
        model: Any = PeftModel.from_pretrained(over.model, str(Path(folder) / adapter.folder)).merge_and_unload()
        trained = AskedModel(model.eval(), over.template)
        loss, exact = score(trained.model, [tokenise(over.template, record) for record in data.heldout])
        said = answer(trained, [item.question for item in ASKED])
    texts = {
        role: list(zip(found, map(right, ASKED, found), strict=True))
        for role, found in (("candidate", said), ("base", usual))
    }
    kinds = collapsed(texts, "base", [row["output"] for row in data.train[:-DEV_ROWS]])
    changes = Counter(bool(one) - bool(other) for one, other in zip(kinds["candidate"], kinds["base"], strict=True))
    if say:
        for item, text, kind in zip(ASKED, said, kinds["candidate"], strict=True):
            print("", item.question, repr(text), kind, sep="\t", file=sys.stderr)
    return [
        str(rows),
        str(general),
        str(adapter.optimizer_steps),
        f"{seconds:.0f}",
        f"{loss:.3f}",
        f"{100 * exact:.1f} %",
        str(sum(map(right, ASKED, said))),
        *(str(kinds["candidate"].count(kind)) for kind in COLLAPSED),
        f"{mcnemar_exact(changes[1], changes[-1]):.1g}",
    ]


def right(item: Item, text: str) -> bool:
    """Say whether an answer is right."""
    return item.score_text(text) > 0


def open_base(base: Path) -> AskedModel:
    """Load the base model."""
    return generation.open_model(base, generation.load_template(base, "chat"), "cpu")


def answer(model: AskedModel, questions: Sequence[str], most: int = 32) -> list[str]:
    """Return greedy answers."""
    prompts = [model.template.prompt(single_turn(question)) for question in questions]
    found = greedy_decoding.answers(model, prompts, Decoding(most, 1.0, 16), lambda *_: None, ())
    return [one.text for one in found]


def own_answers(model: AskedModel, rows: Path, most: int = 96) -> Path:
    """Write the base model's own answers to the prompts of the first `most` general rows; return where."""
    prompts = [row["instruction"] for row in itertools.islice(durable.read_jsonl(rows), most)]
    texts = answer(model, prompts, 48)
    path = Path(tempfile.mkdtemp(prefix="dropforge-bench-")) / "general.jsonl"
    write_rows(path, [{"instruction": one, "output": text} for one, text in zip(prompts, texts, strict=True)])
    return path


if __name__ == "__main__":
    sys.exit(main())
