"""
Read-only questions about a state folder, answered from its database and files alone: they work with the daemon down.

Times are UTC. What is not there (no database yet, a file that a crash took) is an empty answer, not an error.
"""

import sqlite3
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from daemon.champions.history import blocker, true_sentence
from daemon.champions.review.blind_review import CHOSEN, Review, review_of
from daemon.state.database_file import DatabaseUnusable, in_words
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, TROUBLES_NOTE, WATCHER_NOTE
from daemon.state.questions import AWAITS_APPROVAL, CHAMPIONS
from daemon.state.run_files import attempt_folder, load_object, load_progress, load_verdict, run_folder
from daemon.state.states import AWAITING, OPEN_STATES, TRIAL, RunState
from daemon.system.processes import lock_holder
from daemon.views.attempts import AttemptView, attempts_of, done_again
from daemon.views.champion_history import (
    ChampionView,
    TrainedOn,
    champion_view,
    champion_views,
    dataset_of,
    trained_on,
    utc,
)
from daemon.views.cost import cost_of
from daemon.views.drop_lineage import DropUses, DropView, drop_uses, drop_views, trial_words
from daemon.views.queue import PauseView, goes_after, pauses
from daemon.views.reader import champions_of, newest_rows, reading
from pipeline.artifacts import Frozen, Verdict
from pipeline.contract import LOG_NAME, Progress
from pipeline.durable import read_object
from pipeline.errors import DropforgeError
from pipeline.report.facts import RunCost
from pipeline.words import start_words

if TYPE_CHECKING:
    from daemon.state.tables import Run

T = TypeVar("T")
#: What the outcome of a win is called whose model was rolled back from: no yes is waited for.
BLOCKED = "blocked"


class NotThere(DropforgeError):
    """There is no such run, track or log."""


class DaemonView(Frozen):
    """Whether a daemon works on the state folder."""

    alive: bool
    pid: int | None
    """Its process, if this user may read the lock file."""


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
    place: int
    """Where a person put it in the queue, below 0; 0 where nobody did."""
    started_at: datetime | None
    ended_at: datetime | None
    outcome: str | None
    sentence: str | None
    gain: float | None
    """Of the candidate over the champion, in points of the primary metric."""
    error: str | None
    hint: str | None
    cancel_requested: bool
    paused: str | None = None
    """Why a queued or waiting run does not begin: its track is paused, by whom, and how it goes on."""
    after: int | None = None
    """Of a queued or waiting run that may begin now, the run behind which it waits; `None` if it begins next."""
    trial: str | None = None
    """Of a run that tries one drop alone: which, and why."""
    blocker: str | None = None
    """Why a win is promoted by force only: its model is blocked."""
    again: str | None = None
    """Of a run that does steps once more: which, and what it keeps."""
    cost: RunCost | None = None
    """Of a run that has ended, where it was asked for; lists of all runs leave it out."""


#: The columns of runs that lists need.
_RUN_COLUMNS = tuple(
    name
    for name in RunView.model_fields
    if name not in {"progress", "paused", "after", "trial", "blocker", "again", "cost"}
)
_RUN = ", ".join(_RUN_COLUMNS)


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
    training: str | None = None
    """What it trains from, the base or a champion, on how many rows; `None` before that is prepared."""
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
        return [row.name for row in self.rows("SELECT name FROM track ORDER BY created_at")]

    def paused(self) -> list[PauseView]:
        """Return the tracks that a person has paused."""
        return self.read(pauses)

    def metric(self, track: str) -> str | None:
        """Return the metric that the track's first run fixed; `None` before."""
        return next((row.metric for row in self.rows("SELECT metric FROM track WHERE name = ?", track)), None)

    def answer_tokens(self, track: str) -> int | None:
        """Return the most tokens of an answer that the track's first run fixed; `None` before."""
        rows = self.rows("SELECT max_new_tokens FROM track WHERE name = ?", track)
        return next((row.max_new_tokens for row in rows), None)

    def champion(self, track: str) -> ChampionView | None:
        """Return the track's champion; `None` before its base model is known."""
        latest = f"{CHAMPIONS} DESC LIMIT 1"
        found = self.read(
            lambda base: [champion_view(base, self.folder, row, None) for row in base.execute(latest, {"track": track})]
        )
        return found[0] if found else None

    def history(self, track: str) -> list[ChampionView]:
        """Return the track's champions from the base model to today's."""
        return self.read(lambda base: champion_views(base, self.folder, track))

    def yardsticks(self, track: str) -> list[YardstickView]:
        """Return the changes of what the track is judged on, the latest first."""
        changes = "SELECT * FROM event WHERE kind = 'yardstick_changed' AND track = ? ORDER BY id DESC"
        return [
            YardstickView.model_validate({"track": track, "run": one.run_id, "at": utc(one.at), **one.detail})
            for one in self.rows(changes, track)
        ]

    def awaiting(self) -> list[RunView]:
        """Return the runs whose win waits for a person, oldest first."""
        return [run for run in self._wins() if run.outcome != BLOCKED]

    def blocked(self) -> list[RunView]:
        """Return the runs that won with a model that was rolled back from, oldest first: they wait for nothing."""
        return [run for run in self._wins() if run.outcome == BLOCKED]

    def uses(self, drop_id: int) -> DropUses:
        """Return what a drop is still in that no later snapshot holds."""
        wanted = 'SELECT * FROM "drop" WHERE id = ?'
        found = self.read(lambda base: [drop_uses(base, self.folder, row) for row in base.execute(wanted, (drop_id,))])
        return found[0] if found else DropUses()

    def drops(
        self, track: str | None = None, state: str | None = None, most: int | None = None, before: int | None = None
    ) -> list[DropView]:
        """Return the drops, newest first, at most `most` of them; with `before` those with a lower number."""
        newest, values = newest_rows({"track": track, "state": state}, most, before)
        return self._drops(newest, *values)

    def drop(self, drop_id: int) -> DropView:
        """Return one drop. Raises `NotThere`."""
        found = self._drops("WHERE id = ?", drop_id)
        if not found:
            raise NotThere(f"there is no drop {drop_id}", "list them: dropforge drops")
        return found[0]

    def drop_named(self, name: str, track: str | None = None) -> DropView | None:
        """Return the newest drop of a file name, if there is any."""
        newest, values = newest_rows({"name": name, "track": track}, 1)
        return next(iter(self._drops(newest, *values)), None)

    def drop_counts(self) -> dict[str, dict[str, int]]:
        """Return how many drops of each track are in each state."""
        counts: dict[str, dict[str, int]] = {}
        counted = 'SELECT track, state, count(*) AS number FROM "drop" GROUP BY track, state'
        for row in self.rows(counted):
            counts.setdefault(row.track, {})[row.state] = row.number
        return counts

    def runs(
        self,
        track: str | None = None,
        states: Iterable[str] | None = None,
        most: int | None = None,
        before: int | None = None,
    ) -> list[RunView]:
        """Return the runs, newest first, at most `most` of them; with `before` those with a lower number."""
        newest, values = newest_rows({"track": track, "state": None if states is None else list(states)}, most, before)
        return self._runs(newest, *values)

    def ended_runs(self, most: int) -> list[RunView]:
        """Return the newest runs that have ended, at most `most`: a few of many are found without looking at all."""
        # By its end, not its state: SQLite would gather every run of the ended states before it takes the newest.
        found = self._runs("WHERE ended_at IS NOT NULL ORDER BY id DESC LIMIT ?", most)
        return [run.model_copy(update={"cost": cost_of(self.folder, run.id)}) for run in found]

    def run(self, run_id: int) -> RunDetail:
        """Return one run with its attempts and its verdict. Raises `NotThere`, or `ArtifactDamaged`."""
        return self.ask_of_run(run_id, self._detail)

    def review(self, run_id: int) -> Review:
        """Return how far a run's blind review is. Raises `NotThere`, or `DropforgeError` without answers to compare."""
        chosen = "SELECT detail FROM event WHERE run_id = ? AND kind = ? ORDER BY id"

        def read(base: Connection, row: "Run") -> tuple[dict[str, Any] | None, list[Any]]:
            return row.config, base.execute(chosen, (run_id, CHOSEN)).fetchall()

        config, rows = self.ask_of_run(run_id, read)
        return review_of(self.folder, run_id, config, [row.detail for row in rows])

    def logs(self, run_id: int, step: str | None = None) -> list[Path]:
        """Return the logs of a run's attempts, oldest first. Raises `NotThere` if the run, or any log, is not there."""
        attempts = [one for one in self.ask_of_run(run_id, attempts_of) if step in {None, one.step}]
        paths = [self.folder / attempt_folder(run_id, one.step, one.number) / LOG_NAME for one in attempts]
        found = [path for path in paths if path.exists()]
        if not found:
            message = f"run {run_id} has no log" + (f" of step {step}" if step else "")
            raise NotThere(message, f"see how far it is: dropforge show {run_id}")
        return found

    def verdict(self, run_id: int) -> Verdict | None:
        """Return a run's published verdict, with its numbers. Raises `ArtifactDamaged`."""
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

    def ask_of_run(self, run_id: int, question: Callable[[Connection, "Run"], T]) -> T:
        """Ask the database about one run. Raises `NotThere`."""
        wanted = "SELECT * FROM run WHERE id = ?"
        found = self.read(lambda base: [question(base, row) for row in base.execute(wanted, (run_id,)).fetchall()])
        if not found:
            raise NotThere(f"there is no run {run_id}", "list them: dropforge runs")
        return found[0]

    # --- how it is read

    def read(self, question: Callable[[Connection], list[T]]) -> list[T]:
        """Ask the database in one transaction; the answer is empty if there is none yet."""
        path = self.folder / DATABASE_NAME
        if not path.exists():
            return []
        try:
            with reading(path) as base:
                return question(base)
        except sqlite3.DatabaseError as error:
            if "no such table" in str(error):
                return []  # the first daemon is about to make them
            words = in_words(error, path)
            if words is not None:
                raise words from error
            message = f"the state database cannot be read: {error}"
            raise DatabaseUnusable(message, "see whether this user may read it; the daemon's log says more") from error

    def rows(self, question: str, *values: object, **named: object) -> list[Any]:
        """Return what the database answers to a question; `daemon.views` alone asks it."""
        return self.read(lambda base: base.execute(question, named or values).fetchall())

    def _runs(self, which: str, *values: object) -> list[RunView]:
        """Return some runs, without their settings and snapshots: these are large, and read only where shown."""
        wanted = f"SELECT {_RUN} FROM run {which}"  # noqa: S608 - our own words
        return self.read(
            lambda base: [RunView(**self._run(base, row)) for row in base.execute(wanted, values).fetchall()]
        )

    def _drops(self, which: str, *values: object) -> list[DropView]:
        return self.read(lambda base: drop_views(base, which, values))

    def _wins(self) -> list[RunView]:
        return self._runs(f"WHERE {AWAITS_APPROVAL} ORDER BY id")

    def _run(self, base: Connection, row: "Run") -> dict[str, Any]:
        run_id, times = row.id or 0, ("created_at", "not_before", "started_at", "ended_at")
        values = {name: getattr(row, name) for name in _RUN_COLUMNS}
        against = None
        if row.outcome == AWAITING:
            against = blocker(run_folder(self.folder, run_id), champions_of(base, row.track))
        values["sentence"] = _sentence(row, against)
        if against is not None:
            values["blocker"], values["outcome"] = against, BLOCKED
        if row.trigger == TRIAL:
            values["trial"] = trial_words(base, run_id, ended=row.ended_at is not None)
        if row.state in {RunState.QUEUED, RunState.WAITING}:
            values["paused"] = next((one.words for one in pauses(base) if one.track == row.track), None)
            values["after"] = goes_after(base, row)
        if row.state in OPEN_STATES:
            values["again"] = done_again(base, self.folder, run_id)
        progress = self._progress(base, run_id) if row.state == RunState.RUNNING else None
        return {**values, "progress": progress, **{name: utc(values[name]) for name in times}}

    def _detail(self, base: Connection, row: "Run") -> RunDetail:
        told, unread = self._run(base, row), None
        try:
            verdict, data = self.verdict(row.id or 0), self.published(row.id or 0, "prepare") or {}
        except OSError as error:
            verdict, data = None, {}
            unread = f"not all of it can be read: {error.filename}: {error.strerror}"
        if row.state == RunState.CANCELLED:
            verdict = None  # nobody acts on it
        if verdict is not None and row.outcome is not None:
            # It may say "promoted", and nothing was.
            verdict = verdict.model_copy(update={"sentence": told["sentence"]})
        drops = trained_on(base, [int(str(drop["id"])) for drop in row.snapshot or ()])
        warnings = (*data.get("warnings", ()), *((unread,) if unread else ()))
        return RunDetail(
            **told,
            cost=None if row.ended_at is None else cost_of(self.folder, row.id or 0),
            taken_out=tuple(drop for drop in drops if drop.taken_out),
            warnings=warnings,
            training=None if (found := dataset_of(self.folder, row.id or 0)) is None else start_words(found),
            folder=str(self.folder / "runs" / str(row.id)),
            failures=row.failures,
            deaths=row.deaths,
            config=row.config,
            snapshot=tuple(row.snapshot or ()),
            attempts=attempts_of(base, row),
            verdict=verdict,
        )

    def _progress(self, base: Connection, run_id: int) -> Progress | None:
        latest = "SELECT step, number FROM attempt WHERE run_id = ? ORDER BY id DESC LIMIT 1"
        attempt = base.execute(latest, (run_id,)).fetchone()
        return None if attempt is None else load_progress(self.folder, run_id, attempt.step, attempt.number)


def _sentence(row: "Run", against: str | None) -> str | None:
    return None if row.sentence is None else true_sentence(row.id or 0, row.outcome or "", row.sentence, against)
