"""Views of runs: state, progress, outcome and attempts, and why a run does not begin."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from daemon.champions.blind_review import Review, review_of
from daemon.champions.history import blocker
from daemon.state.clauses import verdict_clauses
from daemon.state.questions import AWAITS_APPROVAL, CHAMPIONS, CHOICES, SNAPSHOT
from daemon.state.run_files import attempt_folder, load_curve, load_dataset, load_progress, load_verdict, run_folder
from daemon.state.states import AWAITING, OPEN_STATES, Purpose, RunState, queue_order
from daemon.views.champion_history import TrainedOn, trained_on
from daemon.views.reader import NotThere, Reader, T, Time, newest_rows
from pipeline.artifacts import Frozen, Verdict
from pipeline.contract import LOG_NAME, Curve, Progress
from pipeline.data_words import left_out_words, start_words, warning_words
from pipeline.decide.explain import brief, sentence

#: Of an ended run.
_SECONDS = """
iif(run.ended_at IS NULL, NULL, (SELECT sum(ended_at - started_at) / 1000.0 FROM attempt WHERE run_id = run.id))
AS seconds"""
#: Shown as the outcome of a win whose model was rolled back from: it does not wait for approval.
BLOCKED = "blocked"


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
    """Sum of the times of an ended run's attempts, failed ones included; `None` for an open run or without attempts."""


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


class Runs(Reader):
    """Reads the runs of a workspace, and the pauses of its tracks."""

    def paused(self) -> list[PauseView]:
        """Return the paused tracks with reason, person and time, oldest track first."""
        return self.read(_pauses)

    def runs(
        self,
        track: str | None = None,
        states: Iterable[str] | None = None,
        most: int | None = None,
        before: int | None = None,
    ) -> list[RunView]:
        """Return the runs, newest first, of a track and in `states` if given: at most `most`, ids below `before`."""
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
        """Return the runs that have not ended: the running ones first, then the others in the order of the queue."""
        return sorted(
            self.runs(states=OPEN_STATES), key=lambda run: queue_order(run.state, run.about_drop, run.place, run.id)
        )

    def ended_runs(self, most: int) -> list[RunView]:
        """Return at most `most` ended runs, the last end first."""
        return self._runs("WHERE ended_at IS NOT NULL ORDER BY ended_at DESC, id DESC LIMIT ?", [most])

    def wins(self, *, blocked: bool) -> list[RunView]:
        """Return the wins that wait for approval, oldest first; with `blocked` those that only --force can promote."""
        wins = self._runs(f"WHERE {AWAITS_APPROVAL} ORDER BY id")
        return [run for run in wins if (run.outcome == BLOCKED) == blocked]

    def run(self, run_id: int) -> RunDetail:
        """
        Return one run with its attempts and its verdict: `None` before it is decided, and for a cancelled run.

        If this user may not read its files, `warnings` says so, and its verdict is `None`. Raises `NotThere` if there
        is no such run, `ArtifactDamaged` if its verdict or its prepared data cannot be parsed.
        """
        return self.ask_of_run(run_id, self._run_detail)

    def review(self, run_id: int) -> Review:
        """Return a run's blind review so far. Raises `NotThere` without the run, `DropforgeError` without scores."""
        config = self.ask_of_run(run_id, lambda _, row: row.config)
        return review_of(self.folder, run_id, config, [row.detail for row in self.rows(CHOICES, run=run_id)])

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

    def ask_of_run(self, run_id: int, question: Callable[[Connection, Any], T]) -> T:
        """Return `question(connection, row)` for the run's database row. Raises `NotThere` if there is no such run."""
        answers = self.each(question, f"SELECT *, {_SECONDS} FROM run WHERE id = ?", [run_id])  # noqa: S608 - our own words
        if not answers:
            raise NotThere(f"there is no run {run_id}", "list them: dropforge runs")
        return answers[0]

    def _runs(self, which: str, values: Sequence[object] = ()) -> list[RunView]:
        """Return the runs that an SQL clause such as "WHERE id = ?" selects, with its parameters, in its order."""
        wanted = f"SELECT verdict, {', '.join(_RUN_COLUMNS)}, {_SECONDS} FROM run {which}"  # noqa: S608 - our own words
        return self.each(
            lambda reader, row: RunView.model_validate(self._run_fields(reader, row), extra="ignore"), wanted, values
        )

    def _run_fields(self, reader: Connection, row: Any) -> dict[str, Any]:
        """Return the fields of a `RunView` for a row of table run, with the row's other columns."""
        against = None
        if row.outcome == AWAITING:
            against = blocker(row, reader.execute(CHAMPIONS, {"track": row.track}).fetchall())
        clauses = verdict_clauses(row, against)
        fields = {**vars(row), "clauses": clauses, "sentence": sentence(clauses) or None}
        fields["gain"] = (row.verdict or {}).get("gain")
        if against is not None:
            fields |= {"blocker": against, "outcome": BLOCKED}
        if row.about_drop is not None:
            fields["trial"] = _trial_words(reader, row)
        if row.state in {RunState.QUEUED, RunState.WAITING}:
            fields["paused"] = next((pause.words for pause in _pauses(reader) if pause.track == row.track), None)
        if row.state == RunState.RUNNING:
            for last in attempts_of(reader, row)[-1:]:
                fields["progress"] = load_progress(self.folder, row.id, last.step, last.number)
        return fields

    def _run_detail(self, reader: Connection, row: Any) -> RunDetail:
        unread: tuple[str, ...] = ()
        try:
            verdict, data = load_verdict(self.folder, row.id), load_dataset(self.folder, row.id)
        except OSError as error:
            verdict, data = None, None
            unread = (f"not all of it can be read: {error.filename}: {error.strerror}",)
        if row.state == RunState.CANCELLED:
            verdict = None  # nobody acts on it
        if verdict is not None and row.verdict is None:
            row.verdict = brief(verdict)  # it is not applied yet
        fields = {
            **self._run_fields(reader, row),
            "taken_out": tuple(drop for drop in trained_on(reader, row.snapshot or ()) if drop.taken_out),
            "warnings": (*(warning_words(data) if data else ()), *unread),
            "training": None if data is None or (verdict and not verdict.candidate_model_id) else start_words(data),
            "left_out": "" if data is None else left_out_words(data),
            "folder": str(run_folder(self.folder, row.id)),
            "snapshot": tuple(map(vars, reader.execute(SNAPSHOT, {"run": row.id}))),
            "attempts": attempts_of(reader, row),
            "verdict": verdict,
        }
        return RunDetail.model_validate(fields, extra="ignore")


def attempts_of(reader: Connection, run: Any) -> tuple[AttemptView, ...]:
    """Return the attempts at all steps of a run, oldest first; empty if there are none."""
    wanted = (
        "SELECT step, number, state, started_at, ended_at, error, (ended_at - started_at) / 1000.0 AS seconds "
        "FROM attempt WHERE run_id = ? ORDER BY id"
    )
    return tuple(AttemptView.model_validate(vars(row)) for row in reader.execute(wanted, (run.id,)))


def _pauses(reader: Connection) -> list[PauseView]:
    rows = reader.execute("SELECT name, paused FROM track WHERE paused IS NOT NULL ORDER BY created_at").fetchall()
    return [PauseView(track=row.name, **row.paused) for row in rows]


def _trial_words(reader: Connection, run: Any) -> str:
    """Return words on a run about a drop: it tries the drop, and why; is its trial's control; or leaves it out."""
    verb, why = ("tries", "which may have") if run.ended_at is None else ("tried", "which might have")
    if run.purpose == Purpose.CONTROL:
        return f"control of the trial of drop {run.about_drop}, trained without it"
    if run.purpose == Purpose.LEFT_OUT:
        return f"{verb} the champion's data without drop {run.about_drop}"
    tried = reader.execute("SELECT blamed_run FROM suspect WHERE trial_run = ?", (run.id,)).fetchone()
    return f"{verb} drop {run.about_drop}" + (f", {why} made run {tried.blamed_run} worse" if tried else "")
