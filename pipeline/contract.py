"""The step contract: a step's input (StepSpec), its folder and progress (Attempt), and its output (StepResult)."""

import importlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import Field

from pipeline import durable
from pipeline.artifacts import Artifact, CurvePoint, Drop, Frozen, ModelRef, Stored
from pipeline.config import RunConfig
from pipeline.errors import Interrupted, StepFailed
from pipeline.words import duration, size_words

SPEC_NAME = "spec.json"
RESULT_NAME = "result.json"
PROGRESS_NAME = "progress.json"
#: A training attempt's `Curve` so far; afterwards the train artifact has the curves.
CURVE_NAME = "curve.json"
LOG_NAME = "log.txt"
#: On a cluster: the attempt's job, what Slurm said of that last, the claim of its node, and its revocation.
JOB_NAME, JOB_STATE_NAME, CLAIM_NAME, REVOKED_NAME = "job.json", "job-state.json", "claim.json", "revoked.json"
#: Files of an attempt other than its step's outputs.
STORY_NAMES = frozenset(
    {SPEC_NAME, PROGRESS_NAME, CURVE_NAME, LOG_NAME, JOB_NAME, JOB_STATE_NAME, CLAIM_NAME, REVOKED_NAME}
)
#: Variable with the number of the pipe by which a step notices that its worker has died.
LIFELINE = "DROPFORGE_LIFELINE_FD"
PROGRESS_SECONDS = 2.0
#: From SIGTERM to SIGKILL.
GRACE_SECONDS = 60.0
CURVE_POINTS = 200

A = TypeVar("A", bound=Artifact)


class StepSpec(Stored):
    """The input of one attempt at a step of a run, written by the dispatcher."""

    run: int
    step: str
    attempt: int
    fence: str
    """Token of this attempt; a result with another token is ignored."""
    root: str
    """Absolute path of the work folder: drops, runs, models; every relative path is below it."""
    folder: str
    """The attempt's folder, relative to `root`; the step writes only to it and to `checkpoints`."""
    checkpoints: str
    """The run's checkpoint folder, relative to `root`, shared by the attempts of `train`."""
    predictions: str
    """Folder of cached predictions, relative to `root`; steps only read it."""
    env: dict[str, str]
    inputs: dict[str, str]
    """Published artifacts by step name, relative to `root`."""
    drops: tuple[Drop, ...]
    """The run's drops, of `prepare` and `decide`; other steps do not need them."""
    elders: tuple[Drop, ...] = ()
    """Accepted drops from before the run's latest one that it does not use, of `prepare`: their answers count all the
    same, so that no other drop's answers take their place."""
    champion: ModelRef
    renewed: tuple[int, ...] = ()
    """Drops whose new answers were accepted since the champion's run was queued: training rows, new to the champion.
    No record is: the champion was trained on the other rows of these drops, and guards hold for them."""
    former: tuple[ModelRef, ...] = ()
    """Former champions that may serve again, the latest first: the candidate is compared with them, too."""
    watched: ModelRef | None = None
    """The former champion on watch, which answers the held-out records of `fresh_drops`, too."""
    fresh_drops: tuple[int, ...] = ()
    """The run's drops that are later than those of champion and `watched`, and that were not compared before."""
    uses: int = 0
    """Candidates of the track that were evaluated before."""
    judged_versions: dict[str, int] = Field(default_factory=dict)
    """Of those, how many on each version of the held-out set."""
    suspect: int | None = None
    """Of a trial, the drop that it tries, as it may have made another run worse."""
    trial: dict[str, str] = Field(default_factory=dict)
    """Of a control, the published artifacts of its trial, as in `inputs`."""
    blamed: dict[str, str] = Field(default_factory=dict)
    """Of a trial or control, those of the run that put the drop on trial, if that was trained as the trial was, on the
    same drops; of a control only if the champion was trained so, too."""
    left_out: int | None = None
    """The drop of the champion's that this run leaves out, to see what it is worth."""
    proposed_rows: int = 0
    """Held-out rows of the track that wait for a person's approval."""
    config: RunConfig
    network: bool = False
    """Whether the step may use the network: only then it gets the environment's proxies and the judge's key."""
    parallel: int = 1
    """Most steps at once on this machine, whose processors they share; on a cluster's node a job has its own."""
    grace_seconds: float = GRACE_SECONDS
    """Seconds from SIGTERM to SIGKILL, in which the step writes a checkpoint."""

    @property
    def key(self) -> str:
        """Name of the attempt, `<run>-<step>-<attempt>`, unique in the work folder."""
        return f"{self.run}-{self.step}-{self.attempt}"


class StepError(Frozen):
    """The reason why an attempt failed or was interrupted, with a remedy."""

    message: str
    hint: str = ""


class StepResult(Stored):
    """An attempt's result; written last, so its presence means that the attempt has ended."""

    key: str
    fence: str
    status: Literal["ok", "failed", "interrupted"]
    exit_code: int
    artifact: dict[str, Any] | None = None
    error: StepError | None = None
    outputs: dict[str, str] = Field(default_factory=dict)
    """sha256 of each output file, by path below the attempt's folder."""


class Progress(Frozen):
    """An attempt's progress; rewritten about every `PROGRESS_SECONDS` while it runs."""

    step: str
    phase: str = ""
    note: str = ""
    """In a search, a running trial and its settings."""
    where: str = ""
    """On a cluster, the node of the attempt's job, or why that waits; it is not in the file."""
    done: int = 0
    total: int = 0
    tokens_per_second: float | None = None
    loss: float | None = None
    dev_loss: float | None = None
    """The last measurement, in nats per token."""
    eta_seconds: float | None = None
    updated_at: float = 0.0
    """Seconds since the epoch."""
    memory: int | None = None
    """Estimated memory of the step, in bytes."""

    @property
    def words(self) -> str:
        """The progress in words, as "evaluate champion 48/240, loss 0.512, 310 tokens/s, 20 s left"."""
        phase = "" if self.phase == self.step else self.phase
        counted = f"{self.done}/{self.total}" if self.total else ""
        parts = [" ".join(filter(None, (self.step, phase, counted, self.where)))]
        parts += [self.note] if self.note else []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.dev_loss is not None:
            parts.append(f"dev loss {self.dev_loss:.3f}")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.eta_seconds is not None:
            parts.append(f"{duration(self.eta_seconds)} left")
        if self.memory is not None:
            parts.append(f"about {size_words(self.memory)} of memory")
        return ", ".join(parts)


class Curve(Frozen):
    """A training's losses so far, in nats per token."""

    loss: tuple[CurvePoint, ...] = ()
    """Mean losses of at most `CURVE_POINTS` equal spans of steps, each at its last step."""
    dev: tuple[CurvePoint, ...] = ()
    """All measurements on the dev rows."""


def thinned(points: Sequence[tuple[int, float]]) -> tuple[CurvePoint, ...]:
    """Return the (step, loss) `points` averaged over at most `CURVE_POINTS` equal spans, each at its last step."""
    span = math.ceil(len(points) / CURVE_POINTS) or 1
    groups = [points[start : start + span] for start in range(0, len(points), span)]
    return tuple(CurvePoint(step=g[-1][0], loss=sum(loss for _, loss in g) / len(g)) for g in groups)


class Attempt:
    """A step's interface: its spec, inputs, output folder, progress and stop signal."""

    def __init__(self, spec: StepSpec) -> None:
        """Take the attempt's folder, which must exist, from `spec`."""
        self.spec = spec
        self.root = Path(spec.root)
        self.folder = self.root / spec.folder
        self.stop = threading.Event()
        self._progress = Progress(step=spec.step)
        self._losses: tuple[Sequence[tuple[int, float]], Sequence[tuple[int, float]]] | None = None
        self._lock = threading.Lock()

    @property
    def config(self) -> RunConfig:
        """The run's configuration, fixed with its snapshot."""
        return self.spec.config

    def load(self, kind: type[A]) -> A:
        """
        Return the artifact of class `kind` of an earlier step.

        Raises `StepFailed` if it was not published, `OSError` or `ValueError` if its file is damaged.
        """
        relative = self.spec.inputs.get(kind.step)
        value = durable.read_json(self.root / relative) if relative else None
        if value is None:
            msg = f"step {self.spec.step} needs what step {kind.step} makes, and it is not there"
            raise StepFailed(msg, f"retry the run: dropforge retry {self.spec.run}")
        return kind.model_validate(value)

    def path(self, relative: str) -> Path:
        """Return the absolute path of `relative`, a path below the work folder; an absolute path is unchanged."""
        return self.root / relative

    def relative(self, path: Path) -> str:
        """Return `path` relative to the work folder, as in artifacts. Raises `ValueError` if it is not below it."""
        return path.relative_to(self.root).as_posix()

    def make_folder(self, name: str) -> Path:
        """Create the folder `name` in the attempt's folder; return its path. Raises `FileExistsError` if it exists."""
        folder = self.folder / name
        folder.mkdir()
        return folder

    def progress(self, done: int, total: int, **fields: Any) -> None:
        """
        Set the progress, in memory only: `done` of `total`, and the other fields of `Progress` by name.

        `phase`, `note` and `memory` keep their values unless given, all other fields are reset. Cheap enough to call at
        every optimizer step; a separate thread writes the file, see `write_progress`.
        """
        with self._lock:
            known = {**self._progress.model_dump(include={"phase", "note", "memory"}), **fields}
            self._progress = Progress(step=self.spec.step, done=done, total=total, **known)

    def show_curve(self, losses: Sequence[tuple[int, float]], dev: Sequence[tuple[int, float]]) -> None:
        """Have later `write_progress` calls also write these lists of (step, loss), which may grow, as a `Curve`."""
        self._losses = losses, dev

    def earlier(self, name: str) -> list[Path]:
        """Return the existing files `name` in the folders of the step's earlier attempts, oldest attempt first."""
        folders = (self.folder.with_name(f"{self.spec.step}-{number}") for number in range(1, self.spec.attempt))
        return [folder / name for folder in folders if (folder / name).is_file()]

    def check_stop(self) -> None:
        """Raise `Interrupted` if the step was told to stop; call it where no results would be lost."""
        if self.stop.is_set():
            raise Interrupted(f"step {self.spec.step} was asked to stop")

    def write_progress(self) -> None:
        """Rewrite progress.json with the current time, and curve.json after `show_curve`, in the attempt's folder."""
        with self._lock:
            value = self._progress.model_copy(update={"updated_at": time.time()})
        durable.write_hint(self.folder / PROGRESS_NAME, value.model_dump())
        if self._losses is not None:
            losses, dev = map(list, self._losses)
            points = tuple(CurvePoint(step=step, loss=loss) for step, loss in dev)
            durable.write_hint(self.folder / CURVE_NAME, Curve(loss=thinned(losses), dev=points).model_dump())


@dataclass(frozen=True)
class Step:
    """A step of the pipeline: its artifact, its function, and when it runs."""

    name: str
    writes: type[Artifact]
    needs_gpu: bool = False
    network: bool = False
    """Whether it uses the network. A cluster leaves it to the local worker, whose environment has keys and proxies."""
    wanted: Callable[[RunConfig], bool] = lambda _config: True
    """Whether a run with these settings includes this step."""

    def load(self) -> Callable[[Attempt], Artifact]:
        """Import the step's module, which may be slow, and return its function; it takes an `Attempt`."""
        module = importlib.import_module(f"pipeline.{self.name}.step")
        return cast("Callable[[Attempt], Artifact]", getattr(module, self.name))
