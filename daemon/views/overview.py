"""
Read-only questions about a state folder, answered from its database and files alone: they work with the daemon down.

Times are UTC. What is not there (no database yet, a file that a crash took) is an empty answer, not an error.
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, func
from sqlalchemy.exc import DatabaseError
from sqlmodel import Session, col, select

from daemon.champions.blockers import Blocker, blocker, true_sentence
from daemon.state.database import open_reader
from daemon.state.database_file import DatabaseUnusable
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, TROUBLES_NOTE, WATCHER_NOTE
from daemon.state.run_files import load_object, load_progress, load_verdict
from daemon.state.sqlite_errors import cause_of, in_words
from daemon.state.states import AWAITING, PromotionState, RunState
from daemon.state.tables import Attempt, Drop, Event, Promotion, Run, Track, waits
from daemon.system.processes import lock_holder
from daemon.views.champion_history import (
    WITHOUT_LARGE,
    ChampionView,
    TrainedOn,
    champion_view,
    champion_views,
    trained_on,
    utc,
)
from daemon.views.drop_lineage import DropUses, drop_uses
from pipeline.artifacts import Frozen, Verdict
from pipeline.contract import LOG_NAME, Progress
from pipeline.durable import read_object
from pipeline.errors import DropforgeError

T = TypeVar("T")
#: What the outcome of a win is called whose model was rolled back from: no yes is waited for.
BLOCKED = "blocked"
OPEN_STATES = (RunState.RUNNING, RunState.WAITING, RunState.QUEUED)


class NotThere(DropforgeError):
    """There is no such run, track or log."""


class DaemonView(Frozen):
    """Whether a daemon works on the state folder."""

    alive: bool
    pid: int | None
    """Its process, if this user may read the lock file."""


class DropView(Frozen):
    """One file that was taken in."""

    id: int
    track: str
    role: str
    state: str
    name: str
    rows: int
    findings: int
    warnings: int
    received_at: datetime
    first_run: int | None
    duplicate_of: int | None
    reason: str | None
    sha256: str


class YardstickView(Frozen):
    """A run that was judged on something else than the one before it."""

    track: str
    run: int
    at: datetime
    words: str
    """What changed, by whose word, and what the champion scores on both."""


class RunView(Frozen):
    """One run, and how far it is."""

    id: int
    track: str
    state: str
    trigger: str
    step: str | None
    """The step that it is at, or where it ended."""
    progress: Progress | None
    created_at: datetime
    not_before: datetime
    """A queued or waiting run does not begin before."""
    started_at: datetime | None
    ended_at: datetime | None
    outcome: str | None
    sentence: str | None
    error: str | None
    hint: str | None
    cancel_requested: bool
    blocker: str | None = None
    """Why a win is promoted by force only: its model is blocked, or a drop that it was made from withdrawn since."""


class AttemptView(Frozen):
    """One attempt at one step."""

    step: str
    number: int
    state: str
    started_at: datetime
    ended_at: datetime | None
    seconds: float | None
    error: str | None


class RunDetail(RunView):
    """Everything that is known of one run."""

    folder: str
    failures: int
    deaths: int
    config: dict[str, Any] | None
    snapshot: tuple[dict[str, Any], ...]
    """The drops that it works on."""
    taken_out: tuple[TrainedOn, ...] = ()
    """Those of them that were withdrawn or suspended since."""
    warnings: tuple[str, ...] = ()
    """What is to be known about its data."""
    attempts: tuple[AttemptView, ...]
    verdict: Verdict | None


class Overview:
    """Answers for one state folder."""

    def __init__(self, state_folder: Path) -> None:
        """Look at `state_folder`, which need not exist."""
        self.folder = state_folder

    def daemon(self) -> DaemonView:
        """Say whether a daemon holds the state folder's lock."""
        try:
            pid = lock_holder(self.folder / LOCK_NAME)
        except PermissionError as error:
            message = f"{self.folder} is not readable for this user"
            raise DropforgeError(message, "ask as the user that the daemon runs as: sudo -u USER dropforge") from error
        return DaemonView(alive=pid is not None, pid=pid or None)

    def tracks(self) -> list[str]:
        """Return the names of the tracks that the database knows, in their order of appearance."""
        return self._read(lambda session: list(session.exec(select(Track.name).order_by(col(Track.created_at)))))

    def champion(self, track: str) -> ChampionView | None:
        """Return the track's champion; `None` before its base model is known."""
        done = select(Promotion).where(Promotion.track == track, Promotion.state == PromotionState.DONE)
        latest = done.order_by(col(Promotion.generation).desc()).limit(1)
        found = self._read(
            lambda session: [champion_view(session, self.folder, row, None) for row in session.exec(latest)]
        )
        return found[0] if found else None

    def history(self, track: str) -> list[ChampionView]:
        """Return the track's champions from the base model to today's."""
        return self._read(lambda session: champion_views(session, self.folder, track))

    def yardsticks(self, track: str) -> list[YardstickView]:
        """Return the changes of what the track is judged on, the latest first."""
        changes = select(Event).where(Event.kind == "yardstick_changed", Event.track == track)
        return self._read(
            lambda session: [
                YardstickView.model_validate({"track": track, "run": one.run_id, "at": utc(one.at), **one.detail})
                for one in session.exec(changes.order_by(col(Event.id).desc()))
            ]
        )

    def awaiting(self) -> list[RunView]:
        """Return the runs whose win waits for a person, oldest first."""
        return [run for run in self._wins() if run.outcome != BLOCKED]

    def blocked(self) -> list[RunView]:
        """Return the runs that won with a model that was rolled back from, oldest first: they wait for nothing."""
        return [run for run in self._wins() if run.outcome == BLOCKED]

    def uses(self, drop_id: int) -> DropUses:
        """Return what a drop is still in that no later snapshot holds."""

        def read(session: Session) -> list[DropUses]:
            row = session.get(Drop, drop_id)
            return [] if row is None else [drop_uses(session, self.folder, row)]

        found = self._read(read)
        return found[0] if found else DropUses()

    def drops(self, track: str | None = None, state: str | None = None, most: int | None = None) -> list[DropView]:
        """Return the drops, newest first, at most `most` of them."""
        wanted = select(Drop).order_by(col(Drop.id).desc()).limit(most)
        if track is not None:
            wanted = wanted.where(Drop.track == track)
        if state is not None:
            wanted = wanted.where(Drop.state == state)
        return self._read(lambda session: [_drop(row) for row in session.exec(wanted)])

    def drop_counts(self) -> dict[str, dict[str, int]]:
        """Return how many drops of each track are in each state."""
        counted = select(Drop.track, Drop.state, func.count()).group_by(Drop.track, Drop.state)

        def read(session: Session) -> list[tuple[str, str, int]]:
            return [(track, state, number) for track, state, number in session.exec(counted)]

        counts: dict[str, dict[str, int]] = {}
        for track, state, number in self._read(read):
            counts.setdefault(track, {})[state] = number
        return counts

    def runs(
        self, track: str | None = None, states: Iterable[str] | None = None, most: int | None = None
    ) -> list[RunView]:
        """Return the runs, newest first, at most `most` of them."""
        wanted = select(Run).options(*WITHOUT_LARGE).order_by(col(Run.id).desc()).limit(most)
        if track is not None:
            wanted = wanted.where(Run.track == track)
        if states is not None:
            wanted = wanted.where(col(Run.state).in_(list(states)))
        return self._read(lambda session: [RunView(**self._run(session, row)) for row in session.exec(wanted)])

    def ended_runs(self, most: int) -> list[RunView]:
        """Return the newest runs that have ended, at most `most`: a few of many are found without looking at all."""
        # By its end, not its state: SQLite would gather every run of the ended states before it takes the newest.
        ended = select(Run).where(col(Run.ended_at).is_not(None)).options(*WITHOUT_LARGE)
        newest = ended.order_by(col(Run.id).desc()).limit(most)
        return self._read(lambda session: [RunView(**self._run(session, row)) for row in session.exec(newest)])

    def run(self, run_id: int) -> RunDetail:
        """Return one run with its attempts and its verdict. Raises `NotThere`, or `ArtifactDamaged`."""
        return self._of_run(run_id, self._detail)

    def logs(self, run_id: int, step: str | None = None) -> list[Path]:
        """Return the logs of a run's attempts, oldest first. Raises `NotThere` if the run, or any log, is not there."""
        attempts = [one for one in self._of_run(run_id, _attempts) if step in {None, one.step}]
        paths = [self._attempt_folder(run_id, one.step, one.number) / LOG_NAME for one in attempts]
        found = [path for path in paths if path.exists()]
        if not found:
            message = f"run {run_id} has no log" + (f" of step {step}" if step else "")
            raise NotThere(message, f"see how far it is: dropforge show {run_id}")
        return found

    def verdict(self, run_id: int) -> Verdict | None:
        """Return a run's published verdict, with its numbers. Raises `VerdictDamaged`."""
        return load_verdict(self.folder, run_id)

    def published(self, run_id: int, step: str) -> dict[str, Any] | None:
        """Return what a step of a run published. Raises `ArtifactDamaged`."""
        return load_object(self.folder, run_id, step)

    def inbox_note(self) -> dict[str, Any]:
        """Return what the daemon last said of files in the inbox that it has not taken."""
        note = read_object(self.folder / WATCHER_NOTE)
        return {name: list(note.get(name, ())) for name in ("waiting", "unknown_folders", "full_tracks", "left")}

    def troubles(self) -> dict[str, str]:
        """Return what tracks, hooks and collections have run into, as the daemon last said it: whose, and what."""
        return {whose: str(words) for whose, words in read_object(self.folder / TROUBLES_NOTE).items()}

    # --- how it is read

    @cached_property
    def _engine(self) -> Engine:
        return open_reader(self.folder / DATABASE_NAME)

    def _read(self, question: Callable[[Session], list[T]]) -> list[T]:
        """Ask the database in one transaction; the answer is empty if there is none yet."""
        if not (self.folder / DATABASE_NAME).exists():
            return []
        try:
            with Session(self._engine) as session:
                return question(session)
        except DatabaseError as error:
            if "no such table" in str(error.orig):
                return []  # the first daemon is about to make them
            cause = cause_of(error)
            words = None if cause is None else in_words(cause, self.folder / DATABASE_NAME)
            if words is not None:
                raise words from error
            message = f"the state database cannot be read: {error.orig}"
            raise DatabaseUnusable(message, "see whether this user may read it; the daemon's log says more") from error

    def _wins(self) -> list[RunView]:
        won = select(Run).where(waits()).options(*WITHOUT_LARGE).order_by(col(Run.id))
        return self._read(lambda session: [RunView(**self._run(session, row)) for row in session.exec(won)])

    def _blocker(self, session: Session, row: Run) -> Blocker | None:
        return blocker(session, self.folder, row) if row.outcome == AWAITING else None

    def _of_run(self, run_id: int, question: Callable[[Session, Run], T]) -> T:
        """Ask about one run. Raises `NotThere`."""

        def read(session: Session) -> list[T]:
            row = session.get(Run, run_id)
            return [] if row is None else [question(session, row)]

        found = self._read(read)
        if not found:
            message = f"there is no run {run_id}"
            raise NotThere(message, "list them: dropforge runs")
        return found[0]

    def _attempt_folder(self, run_id: int, step: str, number: int) -> Path:
        return self.folder / "runs" / str(run_id) / "attempts" / f"{step}-{number}"

    def _run(self, session: Session, row: Run) -> dict[str, Any]:
        same = ("track", "state", "trigger", "step", "outcome", "sentence", "error", "hint", "cancel_requested")
        times = ("created_at", "not_before", "started_at", "ended_at")
        progress = self._progress(session, row) if row.state == RunState.RUNNING else None
        values: dict[str, Any] = {name: getattr(row, name) for name in same}
        against = self._blocker(session, row)
        values["sentence"] = _sentence(row, against)
        if against is not None:
            values["blocker"] = against.words
            values["outcome"] = BLOCKED if against.blocked else row.outcome
        return {"id": row.id, "progress": progress, **values, **{name: utc(getattr(row, name)) for name in times}}

    def _detail(self, session: Session, row: Run) -> RunDetail:
        told, unread = self._run(session, row), None
        try:
            verdict, data = self.verdict(row.id or 0), self.published(row.id or 0, "prepare") or {}
        except OSError as error:
            verdict, data = None, {}
            unread = f"not all of it can be read: {error.filename}: {error.strerror}"
        if verdict is not None and row.outcome is not None:
            # It may say "promoted", and nothing was, and knows nothing of drops that were withdrawn meanwhile.
            verdict = verdict.model_copy(update={"sentence": told["sentence"]})
        drops = trained_on(session, [int(str(drop["id"])) for drop in row.snapshot or ()])
        warnings = (*data.get("warnings", ()), *((unread,) if unread else ()))
        return RunDetail(
            **told,
            taken_out=tuple(drop for drop in drops if drop.taken_out),
            warnings=warnings,
            folder=str(self.folder / "runs" / str(row.id)),
            failures=row.failures,
            deaths=row.deaths,
            config=row.config,
            snapshot=tuple(row.snapshot or ()),
            attempts=_attempts(session, row),
            verdict=verdict,
        )

    def _progress(self, session: Session, row: Run) -> Progress | None:
        latest = select(Attempt).where(Attempt.run_id == row.id).order_by(col(Attempt.id).desc())
        attempt = session.exec(latest).first()
        if attempt is None:
            return None
        return load_progress(self.folder, attempt.run_id, attempt.step, attempt.number)


def _sentence(row: Run, against: Blocker | None) -> str | None:
    return None if row.sentence is None else true_sentence(row.id or 0, row.outcome or "", row.sentence, against)


def _drop(row: Drop) -> DropView:
    values = {name: getattr(row, name) for name in DropView.model_fields}
    return DropView.model_validate({**values, "received_at": utc(row.received_at)})


def _attempts(session: Session, run: Run) -> tuple[AttemptView, ...]:
    made = select(Attempt).where(Attempt.run_id == run.id).order_by(col(Attempt.id))
    return tuple(_attempt(row) for row in session.exec(made))


def _attempt(row: Attempt) -> AttemptView:
    seconds = None if row.ended_at is None else (row.ended_at - row.started_at) / 1000
    return AttemptView.model_validate(
        {
            "step": row.step,
            "number": row.number,
            "state": row.state,
            "started_at": utc(row.started_at),
            "ended_at": utc(row.ended_at),
            "seconds": seconds,
            "error": row.error,
        }
    )
