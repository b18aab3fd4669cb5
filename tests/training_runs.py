"""One run's attempts at training, with the checkpoints that they share."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts import TRAINED_FILES, Adapter
from pipeline.config import RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.errors import Interrupted
from pipeline.train.step import train
from tests.made_artifacts import run_config
from tests.prepared_rows import write_rows

Weights = dict[str, torch.Tensor]
#: Seven optimizer steps in each of three epochs, of two micro-batches or more; a checkpoint at each step.
SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "learning_rate": 3e-3,
    "epochs": 3,
    "batch_size": 8,
    "batch_tokens": 200,
    "checkpoint_minutes": 1e-6,
}


class StoppedAfter(Attempt):
    """An attempt that its worker asks to stop when it reports a step: its checkpoint is that of the next one."""

    step = 0

    def progress(self, done: int, total: int, **fields: Any) -> None:
        """Report, and ask."""
        super().progress(done, total, **fields)
        if fields.get("loss") is not None and done >= self.step:
            self.stop.set()


class TrainingRun:
    """A run on rows, with dev rows."""

    def __init__(
        self,
        root: Path,
        base: Path,
        rows: Sequence[Mapping[str, Any]],
        dev: Sequence[Mapping[str, Any]],
        make_attempt: Callable[..., Attempt],
        settings: Mapping[str, Any],
    ) -> None:
        """Write the rows; `settings` of [train] replace `SETTINGS`."""
        named = [{"id": f"row-{number}", **row, "drop": 7} for number, row in enumerate((*rows, *dev))]
        self.dataset = write_rows(root, named[: len(rows)], named[len(rows) :])
        self.root, self.base, self.make_attempt, self.settings = root, base, make_attempt, settings

    def config(self, **settings: Any) -> RunConfig:
        """Return the run's configuration, with some settings of [train] changed."""
        values = {**SETTINGS, **self.settings, **settings}
        return run_config(self.base, train=TrainConfig.model_validate(values))

    def attempt(self, **settings: Any) -> Attempt:
        """Make the run's next attempt."""
        return self.make_attempt("train", config=self.config(**settings), inputs={"prepare": self.dataset})

    def stop_after(self, step: int, **settings: Any) -> StoppedAfter:
        """Train until a checkpoint is left at the step after `step`."""
        attempt = StoppedAfter(self.attempt(**settings).spec)
        attempt.step = step
        with pytest.raises(Interrupted, match=f"step {step + 1} of"):
            train(attempt)
        return attempt

    def finish(self, **settings: Any) -> tuple[Adapter, Weights]:
        """Train to the end; return the artifact and the trained weights."""
        attempt = self.attempt(**settings)
        adapter = train(attempt)
        return adapter, self.weights(adapter)

    def weights(self, adapter: Adapter) -> Weights:
        """Return the weights that a training saved."""
        return load_file(self.root / adapter.folder / TRAINED_FILES[adapter.kind])

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.root / "runs/1/checkpoints"

    def forget(self) -> None:
        """Remove the checkpoints and the memory plan."""
        shutil.rmtree(self.checkpoints)


def same(found: Weights, expected: Weights) -> bool:
    """Return whether the weights are the same to the last bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
