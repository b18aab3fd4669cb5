"""
Read-only queries on a state folder, from its database and files; they need no running daemon.

Times are UTC. Missing data (no database yet, a file lost in a crash) gives an empty result, not an error.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from types import SimpleNamespace
from typing import Any, TypeVar

from daemon.champions.blind_review import CHOSEN, Review, review_of
from daemon.champions.history import blocker
from daemon.inbox.answers.remarks import lacking
from daemon.settings.model import HookSettings, Settings
from daemon.state.clauses import verdict_clauses
from daemon.state.database_file import DatabaseUnusable, in_words
from daemon.state.layout import DATABASE_NAME, LOCK_NAME, TROUBLES_NOTE, WATCHER_NOTE
from daemon.state.questions import AWAITS_APPROVAL, HAS_VERDICT, SNAPSHOT
from daemon.state.run_files import (
    attempt_folder,
    load_curve,
    load_dataset,
    load_progress,
    load_verdict,
    run_folder,
)
from daemon.state.states import AWAITING, OPEN_STATES, Purpose, RunState, queue_order
from daemon.system.folders import StateFolder, WorkFolder
from daemon.system.processes import lock_holder
from daemon.views.champion_history import (
    ChampionView,
    ServingView,
    TrainedOn,
    champion_views,
    serving_views,
    trained_on,
)
from daemon.views.drops import DropUses, DropView, drop_uses, drop_views, last_prepared
from daemon.views.reader import Row, Time, champions_of, newest_rows, reading
from pipeline.artifacts import Frozen, Verdict
from pipeline.contract import LOG_NAME, Curve, Progress
from pipeline.data_words import left_out_words, start_words, warning_words
from pipeline.decide.explain import sentence
from pipeline.durable import read_object
from pipeline.errors import DropforgeError

T = TypeVar("T")
#: More than any generation.
_BEYOND = 1 << 62
#: Of an ended run.
_SECONDS = """
iif(run.ended_at IS NULL, NULL, (SELECT sum(ended_at - started_at) / 1000.0 FROM attempt WHERE run_id = run.id))
AS seconds"""
#: Shown as the outcome of a win whose model was rolled back from: it does not wait for approval.
BLOCKED = "blocked"
#: The number of drops by track and state, and of those on trial, which the index of states does not have.
_COUNTS = 'SELECT track, state, count(*) AS number FROM "drop" GROUP BY track, state'
_ON_TRIAL = 'SELECT "drop".track, state FROM suspect JOIN "drop" ON "drop".id = drop_id WHERE ended IS NULL'


class NotThere(DropforgeError):
    """The requested run, drop, log, report or entry does not exist."""


class DaemonView(Frozen):
    """Whether a daemon works on the state folder."""

    alive: bool
    pid: int | None
    """Process id; `None` if no daemon runs, or the lock file has no id."""


class PauseView(Frozen):
    """A paused track, of which no run begins."""

    track: str
    reason: str
    by: str
    """The person who paused it."""
    at: Time

    @property
    def words(self) -> str:
        """A sentence: the track is paused, by whom, why, and the command that resumes it."""
        return f"track {self.track} is paused by {self.by}: {self.reason}; to resume: dropforge resume {self.track}"


class AttemptView(Frozen):
    """One attempt at one step."""

    step: str
    number: int
    state: str
    started_at: Time
    ended_at: Time | None
    seconds: float | None
    error: str | None


class RunView(Frozen):
    """One run with its state, progress and outcome."""

    id: int
    track: str
    state: str
    trigger: str
    """Why it was queued: `drop`, `nightly`, `hand`, or `idle` for a run about one drop."""
    purpose: str
    """What it is for: `candidate`, `search`, `trial`, `control`, `left_out`."""
    about_drop: int | None
    """The drop that a trial tries, that its control is trained without, or that is left out."""
    step: str | None
    """The step that was begun last; `None` before the first."""
    progress: Progress | None = None
    created_at: Time
    not_before: Time
    """Earliest start of a queued or waiting run."""
    place: int
    """Rank in the queue: below 0 for a run that a person moved to the front, else 0."""
    started_at: Time | None
    ended_at: Time | None
    outcome: str | None
    sentence: str | None = None
    """Its verdict in one line; `None` without one."""
    clauses: tuple[str, ...] = ()
    """The same in parts: outcome, what was measured, remarks."""
    gain: float | None = None
    """Gain of the candidate over the champion, in points of the primary metric."""
    error: str | None
    hint: str | None
    cancel_requested: bool
    paused: str | None = None
    """Why a queued or waiting run does not begin: its track is paused, by whom, and how it is resumed."""
    trial: str | None = None
    """Which drop a trial run tries, and why; of which it is the control; or which it leaves out."""
    blocker: str | None = None
    """Why a win is promoted by force only: its model is blocked."""
    seconds: float | None = None
    """Time that the attempts of an ended run took in sum, failed ones included; `None` if none has ended."""


#: The columns that lists of runs need; settings are large, and read only where they are shown.
_RUN_COLUMNS = tuple(name for name, field in RunView.model_fields.items() if field.is_required())


class RunDetail(RunView):
    """One run with all details: its drops, settings, attempts and verdict."""

    folder: str
    failures: int
    deaths: int
    config: dict[str, Any] | None
    snapshot: tuple[dict[str, Any], ...]
    """The run's drops."""
    taken_out: tuple[TrainedOn, ...] = ()
    """Drops of the snapshot that were withdrawn or suspended since."""
    warnings: tuple[str, ...] = ()
    """Warnings about its data."""
    training: str | None = None
    """What it trains from, the base or a champion, on how many rows; `None` if not prepared or not trained."""
    left_out: str = ""
    """How many rows its data leaves out, by reason; empty for none, and before that is prepared."""
    attempts: tuple[AttemptView, ...]
    verdict: Verdict | None


class LiveRun(Frozen):
    """A running run with its loss curves."""

    run: RunView
    curves: Curve


class Overview:
    """Read-only queries on one state folder."""

    def __init__(
        self, state_folder: StateFolder, work_folder: WorkFolder, hooks: Mapping[str, HookSettings] | None = None
    ) -> None:
        """Query `state_folder` and the runs in `work_folder`; neither need exist. `hooks` are those of each track."""
        self.state, self.folder, self._hooks = state_folder, work_folder, hooks or {}

    @classmethod
    def of(cls, settings: Settings) -> "Overview":
        """Query the folders of `settings`."""
        hooks = {name: settings.track(name).hooks for name in settings.track_names}
        return cls(settings.state_folder, settings.work_folder, hooks)

    def daemon(self) -> DaemonView:
        """Return whether a daemon holds the lock, and its pid. Raises `DropforgeError` if the lock is not readable."""
        try:
            pid = lock_holder(self.state / LOCK_NAME)
        except PermissionError as error:
            raise DropforgeError(
                f"{self.state} is not readable for this user",
                "ask as the user that the daemon runs as: sudo -u USER dropforge",
            ) from error
        return DaemonView(alive=pid is not None, pid=pid or None)

    # --- tracks and champions

    def tracks(self) -> list[str]:
        """Return the names of all tracks in the database, also of those not in the settings any more, oldest first."""
        return [row.name for row in self.rows("SELECT name FROM track ORDER BY created_at")]

    def paused(self) -> list[PauseView]:
        """Return the tracks that a person has paused, with reason, person and time."""
        return self.read(_pauses)

    def fixed(self, track: str) -> Any:
        """Return an object with the `metric` and `max_new_tokens` that the track has fixed; both are `None` before."""
        rows = self.rows("SELECT metric, max_new_tokens FROM track WHERE name = ?", track)
        return rows[0] if rows else SimpleNamespace(metric=None, max_new_tokens=None)

    def champions(self, tracks: Iterable[str]) -> list[ServingView]:
        """Return the champions of `tracks`, in that order, without their data; a track without any is left out."""
        views = self.read(lambda reader: serving_views(reader, self.folder, self._hooks))
        champions = {view.track: view for view in views}
        return [champions[name] for name in tracks if name in champions]

    def champion(self, track: str) -> ChampionView | None:
        """Return the track's champion; `None` if it has none, not even its base model."""
        return next(iter(self.history(track, 1)), None)

    def history(self, track: str, most: int = -1, before: int | None = None) -> list[ChampionView]:
        """Return current and former champions, newest first: at most `most` (-1: all), generations below `before`."""
        values = (track, _BEYOND if before is None else before, most)
        which = "track = ? AND generation < ? ORDER BY generation DESC LIMIT ?"
        return self.read(lambda reader: champion_views(reader, self.folder, self._hooks, which, values))

    def missing_rows(self, settings: Settings, track: str | None = None) -> dict[str, str]:
        """
        Map each declared track (or `track` only) that lacks rows for a first verdict to a sentence that says so.

        A track that ever had a verdict other than "insufficient_evidence" is left out.
        """
        names = [name for name in settings.track_names if track in {None, name}]
        done = self.read(
            lambda reader: [name for name in names if reader.execute(HAS_VERDICT, {"track": name}).fetchone()]
        )
        left = [name for name in names if name not in done]
        sentences = {name: lacking(settings, name, self.fixed(name).metric, self.rows) for name in left}
        return {name: words for name, words in sentences.items() if words is not None}

    def data_warnings(self, track: str | None = None) -> list[str]:
        """Return the warnings about the data of the last prepared run of each track, or of `track` only."""
        names = [name for name in self.tracks() if track in {None, name}]
        last = self.read(lambda reader: [(name, *last_prepared(reader, self.folder, name)) for name in names])
        prepared = [(f"track {name}, run {run}", data) for name, run, data in last if data]
        return [f"{where}: {words}" for where, data in prepared for words in warning_words(data)]

    # --- drops

    def drops(
        self, track: str | None = None, state: str | None = None, most: int | None = None, before: int | None = None
    ) -> list[DropView]:
        """Return the drops of a track and in a state, if given, newest first: at most `most`, ids below `before`."""
        return self._drops(*newest_rows({"track": track, "state": state}, most, before))

    def drop(self, drop_id: int) -> DropView:
        """Return one drop. Raises `NotThere` if there is no such drop."""
        drops = self._drops("WHERE id = ?", [drop_id])
        if not drops:
            raise NotThere(f"there is no drop {drop_id}", "list them: dropforge drops")
        return drops[0]

    def drop_named(self, name: str, track: str | None = None) -> DropView | None:
        """Return the newest drop with this file name, in any state, of `track` or any; `None` if there is none."""
        return next(iter(self._drops(*newest_rows({"name": name, "track": track}, 1))), None)

    def drop_counts(self) -> dict[str, dict[str, int]]:
        """Return the number of drops by track, then by state or "on trial"; states without drops are left out."""
        counts: dict[str, dict[str, int]] = {}
        for row in self.rows(_COUNTS):
            counts.setdefault(row.track, {})[row.state] = row.number
        for row in self.rows(_ON_TRIAL):
            of_track = Counter(counts[row.track])
            of_track.update({row.state: -1, "on trial": 1})
            counts[row.track] = dict(+of_track)
        return counts

    def uses(self, drop_id: int) -> DropUses:
        """Return the serving champion, if trained on this drop, and the one to roll back to; else `None` for both."""
        wanted = 'SELECT * FROM "drop" WHERE id = ?'
        uses = self._each(lambda reader, row: drop_uses(reader, self.folder, row), wanted, [drop_id])
        return uses[0] if uses else DropUses()

    # --- runs

    def runs(
        self,
        track: str | None = None,
        states: Iterable[str] | None = None,
        most: int | None = None,
        before: int | None = None,
    ) -> list[RunView]:
        """Return the runs of a track and in `states`, if given, newest first: at most `most`, ids below `before`."""
        chosen = None if states is None else list(states)
        return self._runs(*newest_rows({"track": track, "state": chosen}, most, before))

    def curves(self, run_id: int) -> Curve:
        """Return the loss curves of a run's training; empty ones if there are none yet or they cannot be read."""
        return load_curve(self.folder, run_id) or Curve()

    def live_runs(self) -> tuple[LiveRun, ...]:
        """Return the running runs with their loss curves so far, the oldest run first."""
        running = reversed(self.runs(states=[RunState.RUNNING]))
        return tuple(LiveRun(run=run, curves=self.curves(run.id)) for run in running)

    def open_runs(self) -> list[RunView]:
        """Return the runs that have not ended in the order of the queue, which the running ones lead."""
        return sorted(
            self.runs(states=OPEN_STATES), key=lambda run: queue_order(run.state, run.about_drop, run.place, run.id)
        )

    def ended_runs(self, most: int) -> list[RunView]:
        """Return at most `most` ended runs, the last end first."""
        return self._runs("WHERE ended_at IS NOT NULL ORDER BY ended_at DESC, id DESC LIMIT ?", [most])

    def wins(self, *, blocked: bool) -> list[RunView]:
        """Return the wins that wait for approval, or those `blocked`, which force alone promotes; oldest first."""
        wins = self._runs(f"WHERE {AWAITS_APPROVAL} ORDER BY id")
        return [run for run in wins if (run.outcome == BLOCKED) == blocked]

    def run(self, run_id: int) -> RunDetail:
        """
        Return one run with its attempts and its verdict, which is `None` for a cancelled run.

        Files that this user may not read give a warning in the result. Raises `NotThere` if there is no such run,
        `ArtifactDamaged` if its verdict or its prepared data cannot be parsed.
        """
        return self.ask_of_run(run_id, self._detail)

    def review(self, run_id: int) -> Review:
        """Return a run's blind review so far. Raises `NotThere` without the run, `DropforgeError` without answers."""
        config = self.ask_of_run(run_id, lambda _, row: row.config)
        rows = self.rows("SELECT detail FROM event WHERE run_id = ? AND kind = ? ORDER BY id", run_id, CHOSEN)
        return review_of(self.folder, run_id, config, [row.detail for row in rows])

    def logs(self, run_id: int) -> list[Path]:
        """Return the log files of a run's attempts, oldest first. Raises `NotThere` if there is no run or no log."""
        attempts = self.ask_of_run(run_id, attempts_of)
        paths = [
            Path(self.folder, attempt_folder(run_id, attempt.step, attempt.number), LOG_NAME) for attempt in attempts
        ]
        there = [path for path in paths if path.exists()]
        if not there:
            raise NotThere(f"run {run_id} has no log", f"see how far it is: dropforge show {run_id}")
        return there

    # --- notes of the daemon

    def inbox_note(self) -> dict[str, Any]:
        """
        Return the daemon's latest note on the files that remain in the inbox; its lists are empty before the first.

        Its keys: "waiting" (files open for writing), "unknown_folders" (of no track), "full_tracks" (too many drops
        wait), "left" (files and folders that it cannot take or use, with the reason).
        """
        note = read_object(self.state / WATCHER_NOTE)
        return {name: list(note.get(name, ())) for name in ("waiting", "unknown_folders", "full_tracks", "left")}

    def troubles(self) -> dict[str, str]:
        """Return the errors last noted by the daemon, by part, such as "track a" or "the worker"; empty if none."""
        return {whose: str(words) for whose, words in read_object(self.state / TROUBLES_NOTE).items()}

    # --- how it is read

    def ask_of_run(self, run_id: int, question: Callable[[Connection, Row], T]) -> T:
        """Return `question(reader, row)` for the run's database row. Raises `NotThere` if there is no such run."""
        wanted = f"SELECT *, {_SECONDS} FROM run WHERE id = ?"  # noqa: S608 - our own words
        answers = self._each(question, wanted, [run_id])
        if not answers:
            raise NotThere(f"there is no run {run_id}", "list them: dropforge runs")
        return answers[0]

    def read(self, question: Callable[[Connection], list[T]]) -> list[T]:
        """
        Call `question` with a read-only connection, in one transaction, and return its result.

        Returns `[]` if there is no database or no table yet. Raises `DatabaseUnusable` if it cannot be read.
        """
        path = self.state / DATABASE_NAME
        if not path.exists():
            return []
        try:
            with reading(path) as reader:
                return question(reader)
        except sqlite3.DatabaseError as error:
            if "no such table" in str(error):
                return []  # the first daemon is about to make them
            raise in_words(error, path) or DatabaseUnusable(
                f"the state database cannot be read: {error}",
                "see whether this user may read it; the daemon's log says more",
            ) from error

    def rows(self, question: str, *values: object, **named: object) -> list[Any]:
        """
        Return the rows of an SQL query, with their columns as attributes; empty if there is no database or table yet.

        Parameters are either positional or named. Raises `DatabaseUnusable` if the database cannot be read.
        """
        return self.read(lambda reader: reader.execute(question, named or values).fetchall())

    def _each(self, question: Callable[[Connection, Row], T], wanted: str, values: Sequence[object]) -> list[T]:
        """Return `question(reader, row)` for each row that the SQL query `wanted` gives."""
        return self.read(lambda reader: [question(reader, row) for row in reader.execute(wanted, values).fetchall()])

    def _runs(self, which: str, values: Sequence[object] = ()) -> list[RunView]:
        wanted = f"SELECT verdict, {', '.join(_RUN_COLUMNS)}, {_SECONDS} FROM run {which}"  # noqa: S608 - our own words
        return self._each(lambda reader, row: RunView(**self._run(reader, row)), wanted, values)

    def _drops(self, which: str, values: Sequence[object]) -> list[DropView]:
        return self.read(lambda reader: drop_views(reader, self.folder, which, values))

    def _run(self, reader: Connection, row: Row) -> dict[str, Any]:
        run_id, against = row.id, None
        values = {name: getattr(row, name) for name in _RUN_COLUMNS}
        if row.outcome == AWAITING:
            against = blocker(row, champions_of(reader, row.track))
        values["gain"], values["seconds"] = (row.verdict or {}).get("gain"), row.seconds
        values["clauses"] = verdict_clauses(row, against)
        values["sentence"] = sentence(values["clauses"]) or None
        if against is not None:
            values["blocker"], values["outcome"] = against, BLOCKED
        if row.about_drop is not None:
            values["trial"] = _trial_words(reader, row)
        if row.state in {RunState.QUEUED, RunState.WAITING}:
            values["paused"] = next((pause.words for pause in _pauses(reader) if pause.track == row.track), None)
        if row.state == RunState.RUNNING:
            values["progress"] = self._progress(reader, run_id)
        return values

    def _detail(self, reader: Connection, row: Row) -> RunDetail:
        run_id = row.id
        unread: tuple[str, ...] = ()
        try:
            verdict, data = load_verdict(self.folder, run_id), load_dataset(self.folder, run_id)
        except OSError as error:
            verdict, data = None, None
            unread = (f"not all of it can be read: {error.filename}: {error.strerror}",)
        if row.state == RunState.CANCELLED:
            verdict = None  # nobody acts on it
        drops = trained_on(reader, row.snapshot or ())
        return RunDetail(
            **self._run(reader, row),
            taken_out=tuple(drop for drop in drops if drop.taken_out),
            warnings=(*(warning_words(data) if data else ()), *unread),
            training=None if data is None or (verdict and not verdict.candidate_model_id) else start_words(data),
            left_out="" if data is None else left_out_words(data),
            folder=str(run_folder(self.folder, run_id)),
            failures=row.failures,
            deaths=row.deaths,
            config=row.config,
            snapshot=tuple(map(vars, reader.execute(SNAPSHOT, {"run": run_id}))),
            attempts=attempts_of(reader, row),
            verdict=verdict,
        )

    def _progress(self, reader: Connection, run_id: int) -> Progress | None:
        latest = "SELECT step, number FROM attempt WHERE run_id = ? ORDER BY id DESC LIMIT 1"
        attempt = reader.execute(latest, (run_id,)).fetchone()
        return None if attempt is None else load_progress(self.folder, run_id, attempt.step, attempt.number)


def attempts_of(reader: Connection, run: Row) -> tuple[AttemptView, ...]:
    """Return the attempts at all steps of a run, oldest first; empty if there are none."""
    wanted = (
        "SELECT step, number, state, started_at, ended_at, error, (ended_at - started_at) / 1000.0 AS seconds "
        "FROM attempt WHERE run_id = ? ORDER BY id"
    )
    return tuple(AttemptView.model_validate(vars(row)) for row in reader.execute(wanted, (run.id,)))


def _pauses(reader: Connection) -> list[PauseView]:
    rows = reader.execute("SELECT name, paused FROM track WHERE paused IS NOT NULL ORDER BY created_at").fetchall()
    return [PauseView(track=row.name, **row.paused) for row in rows]


def _trial_words(reader: Connection, run: Row) -> str:
    """Return in words which drop a run tries and why, whose control it is, or which drop it leaves out."""
    verb, why = ("tries", "which may have") if run.ended_at is None else ("tried", "which might have")
    if run.purpose == Purpose.CONTROL:
        return f"control of the trial of drop {run.about_drop}, trained without it"
    if run.purpose == Purpose.LEFT_OUT:
        return f"{verb} the champion's data without drop {run.about_drop}"
    tried = reader.execute("SELECT blamed_run FROM suspect WHERE trial_run = ?", (run.id,)).fetchone()
    return f"{verb} drop {run.about_drop}" + (f", {why} made run {tried.blamed_run} worse" if tried else "")
