"""
What the second night costs and keeps: trained from the base on everything, or from the champion on what is new.

    python bench/second_night.py [--old 200] [--new 120] [--epochs 3] [--seed 42] [--base FOLDER]

The first night trains SmolLM2-135M-Instruct on the demo's messages and makes the champion. Then comes another kind of
task, in which aisle a product is, and the second night is trained in four ways through the real steps: from the base
on all rows, and from the champion with a replay of 0, 0.1 and 0.3. Printed are the rows, the processor time of
prepare, train and merge, which other work on the machine disturbs least, and, on the held-out records of both kinds,
the mean loss of the answers in nats per token and how many are the likeliest at each of their tokens.

Measured with the defaults on one of two cores with avx512_bf16, shared with other work:

                                 rows   steps   CPU s   old: loss   exact   new: loss   exact
    base                                                    5.851     0 %       6.070     0 %
    first night: the champion     126      96     115       0.020    97 %       7.598     0 %
    from the base                 204     153     174       0.024    97 %       0.001   100 %
    champion, replay 0             78      60      87       1.600    16 %       0.003   100 %
    champion, replay 0.1           86      66      91       0.055    94 %       0.009    98 %
    champion, replay 0.3          101      78     105       0.029    96 %       0.005   100 %
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from daemon.cli.demo import demo_base
from daemon.system.threads import thread_variables
from pipeline import durable
from pipeline.artifacts import Adapter, Artifact, Dataset, Drop, Model, ModelRef
from pipeline.config import RunConfig, SplitConfig, TrainConfig
from pipeline.contract import Attempt, StepSpec
from pipeline.models.manifest import model_id
from tests.demo_data import make_data, write_rows

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.trained import score, tokenise

REPLAYS = (0.0, 0.1, 0.3)
AISLES = {
    "aisle-food": ("rice", "honey", "coffee", "olive oil", "lentils", "oat flakes"),
    "aisle-tools": ("hammer", "drill", "pliers", "wood glue", "sandpaper", "spirit level"),
    "aisle-garden": ("lawn rake", "flower pot", "hose", "tulip bulbs", "compost", "watering can"),
    "aisle-paper": ("envelopes", "notebook", "stapler", "fountain pen", "calendar", "sticky notes"),
}


@dataclass(frozen=True)
class House:
    """A state folder, the base model and the settings that all nights share."""

    root: Path
    base: Path
    base_id: str
    train: TrainConfig

    def drop(self, number: int, rows: Sequence[dict[str, str]]) -> Drop:
        """Keep rows as an accepted drop."""
        aside = self.root / "rows.jsonl"
        write_rows(aside, rows)
        sha256 = durable.sha256_file(aside)
        (self.root / "drops").mkdir(exist_ok=True)
        aside.rename(self.root / f"drops/{sha256}.jsonl")
        path = f"drops/{sha256}.jsonl"
        return Drop(
            id=number, sha256=sha256, name=f"{number}.jsonl", path=path, role="train", rows=len(rows), records=len(rows)
        )

    def night(self, name: str, drops: tuple[Drop, ...], champion: ModelRef, **train: Any) -> "Night":
        """Prepare, train and merge."""
        from pipeline.prepare.step import prepare  # noqa: PLC0415 - after the environment is set
        from pipeline.train.step import train as train_step  # noqa: PLC0415

        began = time.process_time()
        dataset = prepare(self.attempt(name, drops, champion, "prepare", {}, **train))
        adapter = train_step(self.attempt(name, drops, champion, "train", {"prepare": dataset}, **train))
        model = self.merge(name, drops, champion, {"prepare": dataset, "train": adapter})
        return Night(dataset, adapter, model, time.process_time() - began)

    def merge(self, name: str, drops: tuple[Drop, ...], champion: ModelRef, made: dict[str, Artifact]) -> Model:
        """Merge what was trained."""
        from pipeline.merge.step import merge  # noqa: PLC0415 - after the environment is set

        return merge(self.attempt(name, drops, champion, "merge", made))

    def attempt(
        self,
        name: str,
        drops: tuple[Drop, ...],
        champion: ModelRef,
        step: str,
        made: dict[str, Artifact],
        **train: Any,
    ) -> Attempt:
        """Return an attempt of a step after those that made something."""
        config = RunConfig(
            track="default",
            base_model=str(self.base),
            base_model_id=self.base_id,
            salt="bench",
            split=SplitConfig(heldout=0.3, dev=0),
            train=self.train.model_copy(update=train),
        )
        folder = f"{name}/{step}"
        (self.root / folder).mkdir(parents=True)
        for earlier, artifact in made.items():
            durable.write_json(self.root / f"{name}/{earlier}.json", artifact.model_dump(mode="json"))
        spec = StepSpec(
            run=1,
            step=step,
            attempt=1,
            fence="",
            root=str(self.root),
            folder=folder,
            checkpoints=f"{name}/checkpoints",
            predictions="predictions",
            env={},
            inputs={earlier: f"{name}/{earlier}.json" for earlier in made},
            drops=drops,
            champion=champion,
            config=config,
        )
        return Attempt(spec)


@dataclass(frozen=True)
class Night:
    """What came of a night, and the processor's seconds."""

    dataset: Dataset
    adapter: Adapter
    model: Model
    seconds: float


def main() -> int:
    """Measure and print; exit 1 if the second night learned nothing new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("old", 200), ("new", 120), ("seed", 42)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--base", type=Path)
    asked = parser.parse_args()
    os.environ |= thread_variables()
    base = asked.base or demo_base()
    train = TrainConfig(
        learning_rate=4e-4,
        format="chat",
        quantization="none",
        batch_size=4,
        max_length=256,
        epochs=asked.epochs,
        seed=asked.seed,
    )
    with tempfile.TemporaryDirectory(prefix="dropforge-bench-") as folder:
        return measure(House(Path(folder), base, model_id(base), train), asked.old, asked.new)


def measure(house: House, old: int, new: int) -> int:
    """Play the first night, then the second one in each way, and print one table."""
    drops = (
        house.drop(1, make_data(first=old, heldout=1, second=1).first),
        house.drop(2, list(aisle_rows(new))),
    )
    base = ModelRef(model_id=house.base_id, path=str(house.base), generation=0)
    first = house.night("first", drops[:1], base)
    champion = ModelRef(model_id=first.model.model_id, path=first.model.folder, generation=1, drops=(1,))
    ways: dict[str, dict[str, Any]] = {"from the base": {"start": "base"}}
    ways |= {f"champion, replay {replay:g}": {"start": "champion", "replay": replay} for replay in REPLAYS}
    columns = ("", "rows", "replayed", "steps", "CPU s", "old: loss", "exact", "new: loss", "exact")
    table = Table(*columns, title=f"{old} old rows, {new} new ones; load {os.getloadavg()}")
    heldout: list[dict[str, Any]] = []
    rows, losses = [], []
    for name, settings in ways.items():
        night = house.night(name.replace(" ", "-"), drops, champion, **settings)
        heldout = heldout or list(durable.read_jsonl(house.root / night.dataset.folder / "heldout.jsonl"))
        rows.append((name, night, look(house, house.root / night.model.folder, heldout)))
        losses.append(rows[-1][2][2])
        shutil.rmtree(house.root / night.model.folder)
    before = look(house, house.base, heldout)
    after = look(house, house.root / champion.path, heldout)
    table.add_row("base", "", "", "", "", *words(before))
    for name, night, found in [("first night: the champion", first, after), *rows]:
        data, steps = night.dataset, night.adapter.optimizer_steps
        numbers = (f"{data.train_rows}", f"{data.replayed_rows}", f"{steps}", f"{night.seconds:.0f}")
        table.add_row(name, *numbers, *words(found))
    Console(width=120).print(table)
    return 0 if max(losses) < after[2] else 1


def aisle_rows(count: int) -> Iterator[dict[str, str]]:
    """Yield distinct records of the other kind of task."""
    dice = random.Random(11)
    asks = ("Where do I find {}?", "I am looking for {}, size {}.", "Do you have {} in {}?", "My neighbour wants {}.")
    colours = ("red", "blue", "grey", "white", "large", "small", "a box of ten", "a set")
    seen: set[str] = set()
    while len(seen) < count:
        aisle = dice.choice(list(AISLES))
        text = dice.choice(asks).format(dice.choice(AISLES[aisle]), dice.choice(colours))
        text += f" Order {dice.randint(100, 9999)}, for {dice.choice(('Ana', 'Ben', 'Chloe', 'Dev', 'Eva', 'Finn'))}."
        if text not in seen:
            seen.add(text)
            yield {"instruction": "In which aisle is it?", "input": text, "output": aisle}


def look(house: House, folder: Path, heldout: Sequence[dict[str, Any]]) -> tuple[float, float, float, float]:
    """Return a model's loss and share of exact answers on old and new held-out records."""
    from pipeline.models.generation import load_template  # noqa: PLC0415 - after the environment is set
    from pipeline.models.loading import load_model  # noqa: PLC0415

    template, model = load_template(house.base, "chat"), load_model(folder, "cpu")
    model.eval()
    parts = [[tokenise(template, row) for row in heldout if row["drop"] == drop] for drop in (1, 2)]
    (old, old_exact), (new, new_exact) = (score(model, part) for part in parts)
    return old, old_exact, new, new_exact


def words(found: tuple[float, float, float, float]) -> tuple[str, ...]:
    """Return the cells of what was looked at."""
    old, old_exact, new, new_exact = found
    return f"{old:.3f}", f"{old_exact:.0%}", f"{new:.3f}", f"{new_exact:.0%}"


if __name__ == "__main__":
    sys.exit(main())
