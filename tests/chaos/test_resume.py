"""Real steps that are killed or asked to stop in the middle: the next attempt ends where an uncut one does."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import durable
from pipeline.artifacts import Adapter, Artifact, Dataset, Evaluation
from pipeline.config import EvaluateConfig, RunConfig, TrainConfig
from pipeline.contract import LOG_NAME, RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.models.manifest import model_id
from pipeline.records.heldout import dataset_hash
from pipeline.train.checkpoints import COMPLETE, step_of
from tests.made_artifacts import dataset_of, heldout_row, made_spec, model_of, run_config

STEPS = 21
RECORDS = 30
BATCH = 2
#: Of each model, thirty records: fifteen batches of likelihoods, and of answers two, of eight to each of two rows.
BATCHES = 2 * (15 + 2)
_POLL_SECONDS = 0.001


class Steps:
    """The process that forks a step when it is told to (warm_steps.py)."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("warm_steps.py")
        environment = {**os.environ, "DROPFORGE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._alive = False

    def begin(self, spec: StepSpec) -> int:
        """Start a step; return its process number."""
        assert self._process.stdin is not None
        folder = Path(spec.root) / spec.folder
        folder.mkdir(parents=True)
        durable.write_json(folder / SPEC_NAME, spec.model_dump(mode="json"))
        self._process.stdin.write(f"{spec.step} {folder / SPEC_NAME}\n")
        self._process.stdin.flush()
        return int(self._said("began"))

    def end(self) -> int:
        """Wait for the step; return its exit code, negative for a signal."""
        return int(self._said("ended"))

    def run(self, spec: StepSpec) -> StepResult:
        """Run a step to its good end."""
        self.begin(spec)
        assert self.end() == 0, (Path(spec.root) / spec.folder / LOG_NAME).read_text()[-3000:]
        return result_of(spec)

    def cut(self, spec: StepSpec, number: signal.Signals, when: Callable[[], object], delay: float) -> int:
        """Start a step and send it a signal some seconds after a condition holds; return its exit code."""
        pause = threading.Event()
        pid = self.begin(spec)
        while not when():
            assert not (Path(spec.root) / spec.folder / RESULT_NAME).exists(), "it ended before it was cut off"
            pause.wait(_POLL_SECONDS)
        pause.wait(delay)
        os.kill(pid, number)
        return self.end()

    def close(self) -> None:
        with self._process:
            self._process.kill()

    def _said(self, word: str) -> str:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().split()
        assert said, "the process that forks the steps is gone"
        return said[1] if said[0] == word else self._said(word)


@pytest.fixture(scope="module")
def steps() -> Iterator[Steps]:
    made = Steps()
    yield made
    made.close()


@pytest.fixture
def dice(seed: int, capsys: pytest.CaptureFixture[str]) -> random.Random:
    with capsys.disabled():
        print(f"\nDROPFORGE_CHAOS_SEED={seed}")
    return random.Random(seed)


def result_of(spec: StepSpec) -> StepResult:
    return StepResult.model_validate(durable.read_json(Path(spec.root) / spec.folder / RESULT_NAME))


def spec_of(root: Path, step: str, attempt: int, config: RunConfig, inputs: dict[str, Artifact]) -> StepSpec:
    """Order an attempt as the dispatcher does."""
    for name, artifact in inputs.items():
        durable.write_json(root / f"{name}.json", artifact.model_dump(mode="json"))
    published = {name: f"{name}.json" for name in inputs}
    folder = f"attempts/{step}-{attempt}"
    return made_spec(root, step, config, attempt=attempt, folder=folder, checkpoints="checkpoints", inputs=published)


def freeze(root: Path, **rows: list[dict[str, Any]]) -> Dataset:
    """Write a run's rows as `prepare` does."""
    folder = root / "data"
    folder.mkdir(parents=True)
    for name in ("train", "dev", "heldout"):
        lines = (json.dumps({"id": f"{number:08x}", **row}) + "\n" for number, row in enumerate(rows.get(name, [])))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return dataset_of(0, folder="data", train_rows=0, dataset_sha256=dataset_hash(folder))


# Training ----------------------------------------------------------------------------------------------------------


class Training:
    """Fifty rows in batches of 8: 7 optimizer steps an epoch, three epochs, dropout, a dev curve in between."""

    def __init__(self, steps: Steps, tiny: Any, base: Path, quantization: str) -> None:
        self.steps, self.tiny, self.base, self.quantization = steps, tiny, base, quantization

    def spec(self, root: Path, attempt: int, checkpoint_minutes: float = 1e-6) -> StepSpec:
        made = self.tiny.rows(74, seed=3)
        if not (root / "data").exists():
            self.dataset = freeze(root, train=made[:50], dev=made[50:])
        settings = TrainConfig.model_validate(
            {
                "quantization": self.quantization,
                "rank": 4,
                "alpha": 8,
                "dropout": 0.1,
                "learning_rate": 3e-3,
                "epochs": 3,
                "batch_size": 8,
                "checkpoint_minutes": checkpoint_minutes,
            }
        )
        config = run_config(self.base, train=settings)
        return spec_of(root, "train", attempt, config, {"prepare": self.dataset})

    def finish(self, spec: StepSpec) -> tuple[Adapter, dict[str, torch.Tensor]]:
        """Train to the end; return the artifact and the adapter's weights."""
        adapter = Adapter.model_validate(self.steps.run(spec).artifact)
        assert adapter.optimizer_steps == STEPS
        return adapter, load_file(Path(spec.root) / adapter.folder / "adapter_model.safetensors")


@pytest.fixture(scope="module", params=["nf4", "none"] if os.environ.get("DROPFORGE_CHAOS") == "whole" else ["either"])
def training(steps: Steps, tiny: Any, tiny_llama: Path, seed: int, request: pytest.FixtureRequest) -> Training:
    """Return a training over an NF4 base or over one in 16 bits: over either in a sample, over both otherwise."""
    chosen = random.Random(seed).choice(["nf4", "none"]) if request.param == "either" else request.param
    return Training(steps, tiny, tiny_llama, chosen)


@pytest.fixture(scope="module")
def uncut(training: Training, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the weights of a training that nobody disturbed."""
    root = tmp_path_factory.mktemp("uncut")
    adapter, weights = training.finish(training.spec(root, 1, checkpoint_minutes=60))
    assert adapter.resumed_from_step == 0
    assert not checkpoints(root)
    return weights


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """On one CPU with one thread and fixed seeds there is no tolerance: every bit is the same."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def checkpoints(root: Path) -> dict[int, bool]:
    """Return the steps of a run's checkpoints, and whether each is complete."""
    return {step_of(path): (path / COMPLETE).exists() for path in (root / "checkpoints").glob("step-*")}


def has_logged(spec: StepSpec, step: int) -> bool:
    log = Path(spec.root) / spec.folder / LOG_NAME
    return log.exists() and f"step {step} of {STEPS}:" in log.read_text()


@pytest.mark.timeout(900)
def test_a_training_killed_at_a_random_step_ends_in_the_same_weights(
    training: Training, uncut: dict[str, torch.Tensor], tmp_path: Path, dice: random.Random, *, whole: bool
) -> None:
    for number in range(10 if whole else 1):
        root = tmp_path / str(number)
        first = training.spec(root, 1)
        step = dice.randint(2, STEPS - 2)
        delay = dice.uniform(0, 0.1)
        assert training.steps.cut(first, signal.SIGKILL, partial(has_logged, first, step), delay) == -signal.SIGKILL
        newest = max((one for one, complete in checkpoints(root).items() if complete), default=0)
        adapter, weights = training.finish(training.spec(root, 2))
        print(f"{training.quantization}: killed at step {step}, went on from {newest}")
        assert adapter.resumed_from_step == newest
        assert_same(weights, uncut)


@pytest.mark.timeout(300)
def test_a_training_asked_to_stop_leaves_a_checkpoint_at_the_next_step_and_exits_75(
    training: Training, uncut: dict[str, torch.Tensor], tmp_path: Path, dice: random.Random
) -> None:
    first = training.spec(tmp_path, 1, checkpoint_minutes=60)
    step = dice.randint(2, STEPS - 4)
    assert training.steps.cut(first, signal.SIGTERM, partial(has_logged, first, step), 0) == 75
    result = result_of(first)
    assert (result.status, result.exit_code) == ("interrupted", 75)
    ((reached, complete),) = checkpoints(tmp_path).items()
    assert complete
    logged = [line for line in (tmp_path / first.folder / LOG_NAME).read_text().splitlines() if " of 21:" in line]
    assert len(logged) == reached, "no step was trained after the checkpoint"
    adapter, weights = training.finish(training.spec(tmp_path, 2, checkpoint_minutes=60))
    assert adapter.resumed_from_step == reached
    assert_same(weights, uncut)


PUBLISH = """
import os, pathlib, signal, sys
from pipeline.train.checkpoints import newest_valid, publish
place, left = pathlib.Path(sys.argv[1]), 0

def counted(real):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call

for name in ("fsync", "rename", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))

def written(step):
    source = place / f"checkpoint-{step}"
    source.mkdir()
    (source / "optimizer.pt").write_bytes(b"moments" * step)
    (source / "trainer_state.json").write_text(str(step))
    return source

for step in (10, 20):
    publish(written(step), place / "checkpoints", step, "mark", 1)
written(30)
point = died = 0
while point == died:
    point += 1
    child = os.fork()
    if child == 0:
        mine = place / str(point)
        os.system(f"mkdir {mine} && cp -r {place}/checkpoints {place}/checkpoint-30 {mine}")
        left = point
        publish(mine / "checkpoint-30", mine / "checkpoints", 30, "mark", 1)
        os._exit(0)
    died += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(point, newest_valid(place / str(point) / "checkpoints", "mark").name)
"""


def test_killed_at_every_sync_and_rename_of_writing_a_checkpoint_a_whole_one_is_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = [line.split()[1] for line in done.stdout.splitlines()]
    print(f"killed at {len(found) - 1} points of writing a checkpoint")
    assert len(found) > 10
    assert found == sorted(found), "the old one until the new one is complete"
    assert (found[0], found[-1]) == ("step-20-1", "step-30-1")


# Evaluating --------------------------------------------------------------------------------------------------------


class EvaluateStep:
    """Two tiny models that answer thirty records."""

    def __init__(self, steps: Steps, tiny: Any, base: Path, candidate: Path) -> None:
        self.steps, self.tiny, self.base, self.candidate = steps, tiny, base, candidate

    def spec(self, root: Path, attempt: int) -> StepSpec:
        if not (root / "data").exists():
            rows = [heldout_row(f"{n:08x}", row) for n, row in enumerate(self.tiny.rows(RECORDS, seed=5))]
            self.dataset = freeze(root, heldout=rows)
        model = model_of(str(self.candidate), "cand", base_model_id=model_id(self.base), dtype="float32")
        config = run_config(self.base, evaluate=EvaluateConfig(batch_size=BATCH, general=()))
        return spec_of(root, "evaluate", attempt, config, {"prepare": self.dataset, "merge": model})

    def finish(self, spec: StepSpec) -> tuple[dict[str, Any], str]:
        """Evaluate to the end; return what of the report may not depend on an interruption, and all records."""
        report = Evaluation.model_validate(self.steps.run(spec).artifact)
        value = report.model_dump(exclude={"folder"})
        for role in ("candidate", "champion"):
            del value[role]["seconds"]
        return value, (Path(spec.root) / report.folder / "records.jsonl").read_text()


def batches(spec: StepSpec) -> list[int]:
    """Return the number of lines of each model's predictions: of a first attempt, one per batch."""
    stores = (Path(spec.root) / spec.folder).glob("predictions/*.jsonl")
    return [path.read_bytes().count(b"\n") for path in stores]


def has_kept(spec: StepSpec, wanted: int) -> bool:
    return sum(batches(spec)) >= wanted


@pytest.fixture(scope="module")
def evaluation(steps: Steps, tiny: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateStep:
    candidate = tmp_path_factory.mktemp("models") / "candidate"
    tiny.make_model(candidate, seed=1)
    return EvaluateStep(steps, tiny, tiny_llama, candidate)


@pytest.fixture(scope="module")
def uncut_report(evaluation: EvaluateStep, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    spec = evaluation.spec(tmp_path_factory.mktemp("uncut"), 1)
    finished = evaluation.finish(spec)
    assert sum(batches(spec)) == BATCHES
    return finished


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.timeout(300)
def test_an_evaluation_cut_off_goes_on_from_the_predictions_that_it_has(
    evaluation: EvaluateStep,
    uncut_report: tuple[dict[str, Any], str],
    tmp_path: Path,
    dice: random.Random,
    number: signal.Signals,
    *,
    whole: bool,
) -> None:
    for place in range(8 if whole else 1):
        root = tmp_path / str(place)
        first = evaluation.spec(root, 1)
        # Half of it is left to be cut off: a batch takes milliseconds.
        wanted = dice.randint(1, BATCHES // 2)
        delay = dice.uniform(0, 0.01)
        code = evaluation.steps.cut(first, number, partial(has_kept, first, wanted), delay)
        assert code == (75 if number == signal.SIGTERM else -number)
        if number == signal.SIGTERM:
            assert result_of(first).status == "interrupted"
        of_models = batches(first)
        kept = sum(of_models)
        assert wanted <= kept < BATCHES
        second = evaluation.spec(root, 2)
        finished = evaluation.finish(second)
        # The first line of each model that was begun has all batches of the first attempt.
        computed = sum(batches(second)) - len(of_models)
        print(f"{number.name} with {kept} of {BATCHES} batches; the next attempt computed {computed}")
        assert computed == BATCHES - kept, "only what was missing"
        assert finished == uncut_report
