"""Find the files of a state folder that are not kept, each with the reason and the bytes that it frees."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from sqlmodel import Session, select

from daemon.settings.model import Settings
from daemon.state.layout import TRASH_NAME
from daemon.state.states import RunState
from daemon.state.tables import Run
from daemon.storage.retention import DAY_MS, Ended, Kept, tree_bytes
from pipeline.artifacts import Frozen
from pipeline.durable import read_object
from pipeline.steps import STEPS

#: Steps whose artifact names files that are collected; report and verdict of a succeeded run are kept.
_WITH_FILES = ("merge", "train", "prepare")
_STEPS = tuple(step.name for step in reversed(STEPS))
#: Most bytes of cached predictions that are kept.
PREDICTIONS_BYTES = 2_000_000_000


class Item(Frozen):
    """One file or folder that is no longer needed."""

    path: str
    """Relative to the work folder; of a rejected file, to the folder of the inbox."""
    why: str
    bytes: int
    references: tuple[str, ...] = ()
    """Published artifacts that lead to it, in the order in which they are renamed."""


def find_garbage(session: Session, settings: Settings, kept: Kept, now: int) -> Iterator[Item]:
    """
    Yield the models and working files that are not in `kept`, and delete nothing.

    Files that the database does not know are included if older than a day, and the oldest cached predictions beyond
    2 GB, but for those of champions and open runs. `now` is in ms since the epoch.
    """
    finder = _Finder(session, settings, kept, now)
    yield from finder.cut_off()
    yield from finder.models()
    for run in kept.ended:
        yield from finder.run(run)
    yield from finder.unknown_runs()
    yield from finder.predictions()


class _Finder:
    """Searches one state folder for files that are not kept."""

    def __init__(self, session: Session, settings: Settings, kept: Kept, now: int) -> None:
        self._session = session
        self._root = settings.work_folder
        self._limit = f"gc.keep_models = {settings.gc.keep_models}"
        self._kept = kept
        self._now = now

    def cut_off(self) -> Iterator[Item]:
        for path in sorted((self._root / TRASH_NAME).glob("*")):
            yield self._item(path, "collected before, but its deletion was cut off")

    def models(self) -> Iterator[Item]:
        for path in sorted((self._root / "models").glob("*")):
            runs = self._makers.get(path.name, [])
            if self._kept.holds(path) or (not runs and (self._kept.damaged or not self._is_old(path))):
                continue
            why = self._why(runs[0]) if runs else "a model that no run made"
            references = [name for run in runs for name in self._references(run)]
            yield self._item(path, why, references)

    def run(self, run: Ended) -> Iterator[Item]:
        """Yield the working files of an ended run; if it is kept and succeeded, only files that no artifact names."""
        if run.id not in self._kept.runs:
            for path in run.working:
                yield self._item(path, self._why(run), self._references(run))
        elif run.state == RunState.SUCCEEDED:
            for path in run.working:
                if not self._kept.holds(path):
                    yield self._item(path, f"run {run.id} has ended and nothing refers to it")

    def unknown_runs(self) -> Iterator[Item]:
        known = set(map(str, self._session.exec(select(Run.id))))
        for path in sorted((self._root / "runs").glob("*")):
            if path.name not in known and self._is_old(path):
                yield self._item(path, "of a run that the database does not know")

    def predictions(self) -> Iterator[Item]:
        """Yield the oldest cached predictions beyond 2 GB in total, never those of champions and open runs."""
        used: set[str] = set()
        for run_id in self._kept.champion_runs | self._kept.open_runs:
            keys = read_object(self._root / f"runs/{run_id}/evaluate.json").get("prediction_keys")
            used.update(map(str, keys.values()) if isinstance(keys, dict) else ())
        files = {path: [file.lstat() for file in path.glob("*")] for path in (self._root / "predictions").glob("*")}
        total = sum(stat.st_size for stats in files.values() for stat in stats)
        by_age = sorted(files, key=lambda path: (max((stat.st_mtime for stat in files[path]), default=0), path.name))
        for path in by_age:
            if total > PREDICTIONS_BYTES and path.name not in used:
                total -= sum(stat.st_size for stat in files[path])
                yield self._item(path, f"cached predictions beyond {PREDICTIONS_BYTES:,} bytes")

    # --- small parts

    @cached_property
    def _makers(self) -> dict[str, list[Ended]]:
        """Model name → ended runs that made it."""
        makers: dict[str, list[Ended]] = {}
        for run in self._kept.ended:
            for name in run.models:
                makers.setdefault(name, []).append(run)
        return makers

    def _references(self, run: Ended) -> list[str]:
        # A run without a verdict may be retried: it must not skip a step whose files are gone.
        steps = _WITH_FILES if run.state == RunState.SUCCEEDED else _STEPS
        return [f"runs/{run.id}/{step}.json" for step in steps]

    def _why(self, run: Ended) -> str:
        outcome = self._session.exec(select(Run.outcome).where(Run.id == run.id)).one()
        return f"run {run.id}: {outcome or run.state}, beyond {self._limit}"

    def _is_old(self, path: Path) -> bool:
        found = path.lstat()
        return self._now - 1000 * max(found.st_mtime, found.st_ctime) > DAY_MS

    def _item(self, path: Path, why: str, references: Iterable[str] = ()) -> Item:
        relative = path.relative_to(self._root).as_posix()
        return Item(path=relative, why=why, bytes=tree_bytes(path), references=tuple(references))
