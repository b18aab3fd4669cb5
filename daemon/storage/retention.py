"""
Determine the files that `gc` keeps, from the database; nothing is changed.

Kept whatever the settings say: base models, each track's current and previous champion and the targets of its links,
wins that wait for approval, and everything of a run that is not over. More former champions and other runs are kept by
number, the newest first (settings `gc`).
"""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import text
from sqlmodel import Session, col, select

from daemon.settings.model import Settings
from daemon.state.database import waits
from daemon.state.states import OPEN_STATES, RunState
from daemon.state.tables import Promotion, Run, Suspect, Track
from daemon.state.troubles import in_words
from pipeline.contract import RESULT_NAME, SPEC_NAME, STORY_NAMES
from pipeline.durable import read_object
from pipeline.errors import DropforgeError
from pipeline.steps import STEPS

DAY_MS = 86_400_000
#: Small files of an attempt that document it; they are always kept.
_STORY = STORY_NAMES | {RESULT_NAME, "report"}
_ENDED = """
SELECT id, ended_at, track, state, outcome FROM run WHERE ended_at IS NOT NULL ORDER BY ended_at DESC, id DESC
"""
#: Steps whose artifact names files that are collected.
_WITH_FILES = ("merge", "train", "prepare")


class Ended(NamedTuple):
    """A run that is over, with the names of its models in `models/` and its `working_files`."""

    id: int
    track: str
    state: str
    outcome: str | None
    models: set[str]
    working: tuple[Path, ...]

    @property
    def references(self) -> list[str]:
        """Work folder paths of artifacts, perhaps missing, that lead to its files, the last step's first."""
        # A run without a verdict may be retried: it must not skip a step whose files are gone. Report and verdict of a
        # run that succeeded are kept.
        steps = _WITH_FILES if self.state == RunState.SUCCEEDED else tuple(step.name for step in reversed(STEPS))
        return [f"runs/{self.id}/{step}.json" for step in steps]


@dataclass
class Kept:
    """The models, runs and folders that a collection keeps."""

    paths: set[Path] = field(default_factory=set)
    """Resolved: models, drops, open runs, and the folders that the artifacts of kept ended runs name."""
    above: set[Path] = field(default_factory=set)
    """The parents of `paths`."""
    champion_runs: set[int] = field(default_factory=set)
    """Runs that made a champion that is kept, or whose win waits for approval."""
    open_runs: set[int] = field(default_factory=set)
    newest_runs: set[int] = field(default_factory=set)
    """Ended runs within the limits of the settings."""
    ended: list[Ended] = field(default_factory=list)
    """The runs that are over and have files, the latest first."""
    damaged: list[DropforgeError] = field(default_factory=list)
    """Of each run whose folder cannot be read, why: nobody knows which models it needs."""

    @property
    def runs(self) -> set[int]:
        """The ids of ended runs whose files are kept."""
        return self.champion_runs | self.newest_runs

    def holds(self, path: Path) -> bool:
        """Return whether `path` is kept, lies in a kept folder, or contains one."""
        place = _real(path)
        return place in self.paths or place in self.above or not self.paths.isdisjoint(place.parents)

    def keep(self, paths: set[Path]) -> None:
        """Keep `paths`, which are resolved, with all that is below them."""
        self.paths |= paths
        self.above.update(*(path.parents for path in paths))

    @contextlib.contextmanager
    def alone(self, run_folder: Path) -> Iterator[None]:
        """Suppress an `OSError` of the block that reads a run's folder: keep that folder, and add to `damaged`."""
        try:
            yield
        except OSError as error:
            self.keep({_real(run_folder)})
            self.damaged.append(
                DropforgeError(
                    f"the files of run {run_folder.name} cannot be read, so they and models of no known run are kept: "
                    f"{in_words(error)}"
                )
            )


def what_is_kept(session: Session, settings: Settings, now: int, cleared: set[tuple[int, int]]) -> Kept:
    """
    Return the models, runs and folders that must be kept, with all of a run that cannot be read.

    `cleared` are ended runs, by id and end, that have no files any more: they are not looked at. Those that ended more
    than a day before `now` (ms) are added: no step of them writes any more.
    """
    kept = what_is_in_use(session, settings)
    _list_ended(session, settings.work_folder, kept, now, cleared)
    # Of each track the newest with files, counted apart by whether they succeeded.
    models, counts = settings.work_folder / "models", Counter[tuple[str, bool]]()
    for run in kept.ended:
        has_files = run.working or any(not kept.holds(models / name) for name in run.models)
        if has_files and run.id not in kept.champion_runs:
            counts[run.track, run.state == RunState.SUCCEEDED] += 1
            if counts[run.track, run.state == RunState.SUCCEEDED] <= settings.gc.keep_models:
                kept.newest_runs.add(run.id)
    for run_id in kept.newest_runs:
        kept.keep(models_of(settings.work_folder, run_id))
    for folder in (settings.work_folder / "runs" / str(run_id) for run_id in kept.runs):
        # Data set, adapter, report.
        kept.keep(
            _places(settings.work_folder, *(read_object(folder / f"{step.name}.json").get("folder") for step in STEPS))
        )
    return kept


def what_is_in_use(session: Session, settings: Settings) -> Kept:
    """Return what is kept whatever `gc.keep_models`: bases, champions, former ones, open runs, pending wins, trials."""
    root = settings.work_folder
    kept = Kept()
    kept.keep({_real(root / "drops")})
    bases = [settings.track(name).base_model for name in settings.track_names]
    kept.keep({_real(Path(base)) for base in bases if base})
    for track in session.exec(select(Track)).all():
        kept.keep(_places(root, track.base_path, track.champion_path))
        # Its champion, its predecessor, former ones and the one on watch.
        past = select(Promotion).where(Promotion.track == track.name)
        rows = session.exec(past.order_by(col(Promotion.generation).desc())).all()
        paths = list(dict.fromkeys(row.model_path for row in rows))[: 2 + settings.gc.keep_champions]
        paths += [row.model_path for row in rows if row.generation == track.watch_former]
        kept.keep(_places(root, *paths, *(row.previous_path for row in rows[:1])))
        kept.champion_runs |= {row.run_id for row in rows if row.run_id is not None and row.model_path in paths}
    kept.keep({_real(link) for link in root.glob("tracks/*/*") if link.is_symlink()})
    for run in session.exec(select(Run).where(col(Run.state).in_(OPEN_STATES))).all():
        kept.open_runs.add(run.id or 0)
        with kept.alone(root / "runs" / str(run.id)):
            _keep_open(root, run, kept)
    wins = session.exec(select(Run.id).where(waits())).all()
    trials = [suspect.trial_run for suspect in session.exec(select(Suspect).where(col(Suspect.ended).is_(None)))]
    for run_id in filter(None, [*wins, *trials]):
        # Kept until it is approved, the champion changes or its control has decided, whatever its age.
        kept.champion_runs.add(run_id)
        kept.keep(models_of(root, run_id))
    return kept


def _list_ended(session: Session, root: Path, kept: Kept, now: int, cleared: set[tuple[int, int]]) -> None:
    """Add runs that are over to `kept.ended`, the latest first, or to `cleared` if long over and without files."""
    models = {path.name for path in (root / "models").glob("*")}
    for run_id, end, track, state, outcome in session.execute(text(_ENDED)):
        folder, key = root / "runs" / str(run_id), (run_id, end)
        if key in cleared:
            continue
        with kept.alone(folder):
            _require_readable(folder)
            # Also if a collection was cut off after it had renamed the artifact.
            model_ids = models & {*_named(folder), str(read_object(folder / "merge.removed.json").get("model_id"))}
            run = Ended(run_id, track, state, outcome, model_ids, tuple(working_files(folder)))
            if run.models or run.working:
                kept.ended.append(run)
            elif end < now - DAY_MS:
                cleared.add(key)


def _require_readable(run_folder: Path) -> None:
    """Raise `OSError` if a run's folder exists and cannot be read: nobody would know which models it needs."""
    with contextlib.suppress(FileNotFoundError), os.scandir(run_folder) as entries:
        for entry in entries:
            if not os.access(entry.path, os.R_OK | (os.X_OK if entry.is_dir() else 0)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), entry.path)


def _keep_open(root: Path, run: Run, kept: Kept) -> None:
    """Add everything of a run that is not over, and every model that it uses, to `kept`."""
    folder = root / "runs" / str(run.id)
    _require_readable(folder)
    kept.keep({_real(folder)} | models_of(root, run.id or 0))
    kept.keep(_places(root, (run.config or {}).get("base_model")))
    for path in folder.glob("attempts/*/*.json"):
        value = read_object(path)
        # A merge that has ended may be published at any moment; a spec names the champion of its time, which the run
        # may go on from when others have come.
        artifact, champion = value.get("artifact"), value.get("champion")
        identity = artifact.get("model_id") if path.name == RESULT_NAME and isinstance(artifact, dict) else None
        champion = champion.get("path") if path.name == SPEC_NAME and isinstance(champion, dict) else None
        kept.keep(_places(root, champion, f"models/{identity}" if identity else None))


def models_of(root: Path, run_id: int) -> set[Path]:
    """Return the resolved folders, existing or not, of the models that a run's published merge and verdict name."""
    return _places(root, *(f"models/{name}" for name in _named(root / "runs" / str(run_id))))


def _named(run_folder: Path) -> set[str]:
    merged, verdict = read_object(run_folder / "merge.json"), read_object(run_folder / "decide.json")
    return {str(name) for name in (merged.get("model_id"), verdict.get("candidate_model_id")) if name}


def working_files(run_folder: Path) -> Iterator[Path]:
    """Yield a run's `checkpoints`, temporary files, and the `leftovers` of its attempts."""
    yield from sorted(run_folder.glob(".*.tmp"))
    if (run_folder / "checkpoints").exists():
        yield run_folder / "checkpoints"
    for attempt in sorted(run_folder.glob("attempts/*")):
        yield from leftovers(attempt)


def leftovers(attempt: Path) -> Iterator[Path]:
    """Yield the files and folders in the folder `attempt` except spec, result, progress, curve, log and report."""
    if attempt.is_dir():
        yield from (path for path in sorted(attempt.iterdir()) if path.name not in _STORY)


def tree_bytes(path: Path) -> int:
    """Return the bytes that deleting a file or folder frees: 0 if missing; a file with other hard links frees none."""
    files, size = [path], 0
    if path.is_dir() and not path.is_symlink():
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            info = file.lstat()
            size += info.st_size if info.st_nlink == 1 else 0
    return size


def _places(root: Path, *paths: object) -> set[Path]:
    return {_real(root / path) for path in paths if isinstance(path, str) and path and "\0" not in path}


def _real(path: Path) -> Path:
    """Return the path without links; of a link to itself its own path, where `resolve` raises."""
    return Path(os.path.realpath(path))
