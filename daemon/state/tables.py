"""
The tables of the state database; `states` documents the states of their rows.

Only `queue` writes `Run.state`, only `queue.states` writes `Attempt.state`, only `intake`, `drops` and `suspects` write
`Drop.state`, only `suspects` writes `Suspect`, only `daemon.champions` writes `Promotion` and the champion columns of
`Track`, only `hooks` what became of a promotion's commands, only `outbox` writes `Message` and `Outbox`. Times are
whole milliseconds since the epoch, UTC. Every change of a state but a message's leaves an `Event` row in the same
transaction.

A new database is made from these tables (`daemon.state.database.create`); each change here raises
`daemon.state.database_file.SCHEMA`. SQLite refuses values of other types than the columns' (`column_rules`), whoever
writes them: one bad row must not keep others from being read.
"""

from typing import Any

from sqlalchemy import CheckConstraint, Index, LargeBinary, text
from sqlmodel import JSON, Column, Field, SQLModel

from daemon.state.column_rules import one_of, require_types
from daemon.state.questions import IS_DISMISSAL
from daemon.state.states import (
    AttemptState,
    DropState,
    HookState,
    MessageState,
    PromotionKind,
    Purpose,
    RunState,
    SuspectEnd,
)


class Track(SQLModel, table=True):
    """One track and its champion; values that a verdict fixed stay here, whatever the settings say later."""

    __table_args__ = (
        CheckConstraint(
            "paused IS NULL OR json_extract(paused, '$.reason') || json_extract(paused, '$.by') IS NOT NULL "
            "AND json_extract(paused, '$.at') > 0",
            name="paused_whole",
        ),
    )

    name: str = Field(primary_key=True)
    salt: str
    created_at: int
    #: JSON of SplitConfig, fixed at the first verdict.
    split: dict[str, float] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: Primary metric and answer length, fixed at the first verdict.
    metric: str | None = None
    max_new_tokens: int | None = None
    #: What is on one side of the split as a whole (`pipeline.config.Unit`), fixed at the first verdict.
    unit: str | None = None
    #: Prompts per batch in generation, as in the first report.
    eval_batch_size: int | None = None
    base_path: str | None = None
    base_model_id: str | None = None
    #: The champion: its row here is the truth, the link follows it. Generation 0 is the base model.
    champion_generation: int | None = None
    champion_model_id: str | None = None
    champion_path: str | None = None
    #: The generation of the former champion on watch, and the first run of that watch; `None` between two watches.
    watch_former: int | None = None
    watch_since: int | None = Field(default=None, foreign_key="run.id")
    #: The nightly schedule, since when it applies, and when it was last checked.
    nightly: dict[str, object] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: Why it is paused, by whom and when; `None` unless it is paused.
    paused: dict[str, object] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))


class Drop(SQLModel, table=True):
    """One file that was taken out of the inbox, also a rejected or duplicate one (`DropState`)."""

    __table_args__ = (
        one_of("state", DropState),
        CheckConstraint("role IN ('train', 'heldout')", name="role_known"),
        Index("one_accepted_drop", "track", "role", "sha256", unique=True, sqlite_where=text("state = 'accepted'")),
        # To count by state for `status`, find a file that was taken already, and find drops that wait for a run.
        Index("drop_states", "track", "state"),
        Index("drop_rejected", "received_at", sqlite_where=text("state = 'rejected'")),
        Index("drop_proposed", "id", sqlite_where=text("state = 'proposed'")),
        Index("drop_answers", "id", sqlite_where=text("new_answers > 0")),
        Index("drop_names", "track", "role", "name_bytes"),
        Index("drop_watched", "track", "watch_run", sqlite_where=text("watch_run IS NOT NULL")),
        Index("drop_waiting", "track", "role", "state", sqlite_where=text("first_run IS NULL")),
    )

    id: int | None = Field(default=None, primary_key=True)
    track: str
    role: str
    state: str
    #: The file's name as bytes: names need not be UTF-8.
    name_bytes: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    name: str
    #: The name of the user who dropped the file.
    owner: str | None = None
    #: Empty if the file was not read.
    sha256: str = Field(index=True)
    size_bytes: int
    rows: int = 0
    #: Answers to learn or to judge by in its good rows, each once; of a conversation several.
    records: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    #: Of its good rows, those with the tag `selected`, which are never held out.
    selected: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    findings: int = 0
    warnings: int = 0
    #: Bad rows that were set aside (`on_bad_rows = "quarantine"`); they are in no file that is trained on.
    quarantined: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    #: The drop whose content this one repeats.
    duplicate_of: int | None = Field(default=None, foreign_key="drop.id", index=True)
    #: Why it is proposed, rejected or withdrawn; in words.
    reason: str | None = None
    #: What its trial found, as JSON (`daemon.state.clauses.Suspension`); `None` unless it is suspended.
    suspension: dict[str, object] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    received_at: int
    #: The first run whose snapshot includes it; `None` while it waits for a run.
    first_run: int | None = Field(default=None, foreign_key="run.id", index=True)
    #: Whether a person ever restored it: then it is not put on trial or left out again.
    restored: bool = Field(default=False, sa_column_kwargs={"server_default": "0"})
    #: Rows with other answers to questions of earlier drops, in the data of the track's last run.
    new_answers: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    #: Whether these count: a person accepted them, or `intake.new_answers` is "accept".
    answers_accepted: bool = Field(default=False, sa_column_kwargs={"server_default": "0"})
    #: How well the champion's answers agree with it, as JSON (`pipeline.artifacts.Preview`); `None` if not tried.
    preview: dict[str, object] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: What the champion loses without it, in points, by the last run that left it out; `None` if none did.
    worth_points: float | None = None
    worth_half_width: float | None = None
    worth_run: int | None = Field(default=None, foreign_key="run.id")
    #: The champion's mean minus the former champion's on it, in points, and the run that compared them, once for ever.
    watch_points: float | None = None
    watch_run: int | None = Field(default=None, foreign_key="run.id")


class Run(SQLModel, table=True):
    """One run of the pipeline for one track."""

    __table_args__ = (
        one_of("state", RunState),
        one_of("purpose", Purpose),
        CheckConstraint("(purpose IN ('candidate', 'search')) = (about_drop IS NULL)", name="purpose_whole"),
        CheckConstraint("(state = 'running') = (token IS NOT NULL)", name="running_has_token"),
        CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled', 'crashed')) = (ended_at IS NOT NULL)", name="final_has_end"
        ),
        Index("one_open_run", "track", unique=True, sqlite_where=text("state = 'queued'")),
        Index("run_ends", "ended_at", sqlite_where=text("ended_at IS NOT NULL")),
        Index("run_awaiting", "outcome", sqlite_where=text("outcome = 'awaiting_approval'")),
        Index("run_left_out", "about_champion", sqlite_where=text("about_champion IS NOT NULL")),
    )

    id: int | None = Field(default=None, primary_key=True)
    track: str = Field(index=True)
    state: str = Field(default=RunState.QUEUED, index=True)
    #: Why it was queued: `drop`, `nightly`, `hand`, or `idle` for a run about one drop.
    trigger: str
    purpose: str = Field(default=Purpose.CANDIDATE, sa_column_kwargs={"server_default": "candidate"})
    #: The drop that a trial tries, that its control is trained without, or that is left out.
    about_drop: int | None = Field(default=None, foreign_key="drop.id", index=True)
    #: The trial that a control is compared with.
    control_of: int | None = Field(default=None, foreign_key="run.id", index=True)
    #: The id of the champion whose drop is left out.
    about_champion: str | None = None
    created_at: int
    #: Not claimed before: the end of the track's quiet time, or of a back-off.
    not_before: int
    #: Priority, the lowest first: 0, or negative if a person moved the run to the front.
    place: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    #: Claim token: every write of the run's owner is conditional on it.
    token: str | None = None
    started_at: int | None = None
    ended_at: int | None = None
    #: JSON of RunConfig, set when it begins; a retried run gets today's.
    config: dict[str, object] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: Ids of the drops that it uses, in order, as JSON; `None` before the first claim. Their rows keep hash and role.
    snapshot: list[int] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: Failures, and deaths in a row (its process vanished), each counted against `retry.limit`; no interruptions.
    failures: int = 0
    deaths: int = 0
    cancel_requested: bool = False
    step: str | None = None
    error: str | None = None
    hint: str | None = None
    #: The verdict's outcome; of a win that a person has to approve `awaiting_approval`, until another champion comes:
    #: then `overtaken`. Of a trial that its control settled it is that of a win, as in `verdict`.
    outcome: str | None = None
    #: The numbers of its verdict as JSON (`pipeline.decide.explain.brief`); decide.json has all.
    verdict: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: The held-out set that its candidate was judged on.
    heldout_version: str | None = None


class Suspect(SQLModel, table=True):
    """A drop that may have made a run worse: until `ended` is set, no run but its trial uses it."""

    __table_args__ = (
        one_of("ended", SuspectEnd),
        Index("one_open_suspect", "drop_id", unique=True, sqlite_where=text("ended IS NULL")),
        Index("one_trial", "track", unique=True, sqlite_where=text("ended IS NULL AND trial_run IS NOT NULL")),
    )

    #: Suspects are tried in the order of their numbers.
    id: int | None = Field(default=None, primary_key=True)
    track: str
    drop_id: int = Field(foreign_key="drop.id")
    #: The run whose verdict put it under suspicion; the suspects of one run are one search.
    blamed_run: int = Field(foreign_key="run.id")
    #: The run that tries it; `None` before its turn.
    trial_run: int | None = Field(default=None, foreign_key="run.id", index=True)
    #: `None` while it is on trial.
    ended: str | None = None


class Attempt(SQLModel, table=True):
    """One attempt at one step."""

    __table_args__ = (
        one_of("state", AttemptState),
        Index("one_attempt_number", "run_id", "step", "number", unique=True),
        Index("one_open_attempt", "run_id", unique=True, sqlite_where=text("state = 'submitted'")),
    )

    id: int | None = Field(default=None, primary_key=True)
    run_id: int = Field(foreign_key="run.id", index=True)
    step: str
    number: int
    fence: str
    state: str = AttemptState.SUBMITTED
    started_at: int
    ended_at: int | None = None
    error: str | None = None


class Promotion(SQLModel, table=True):
    """One change of a track's champion; append-only except the state of its hook and health command."""

    __table_args__ = (
        one_of("kind", PromotionKind),
        one_of("hook_state", HookState),
        one_of("health_state", HookState),
        Index(
            "one_promotion_a_run", "run_id", unique=True, sqlite_where=text("kind = 'promotion' AND run_id IS NOT NULL")
        ),
        Index("one_generation", "track", "generation", unique=True),
        # To find other promotions of the same model for each line of a long history.
        Index("promotion_models", "track", "model_id"),
    )

    id: int | None = Field(default=None, primary_key=True)
    track: str = Field(index=True)
    run_id: int | None = Field(default=None, foreign_key="run.id")
    kind: str = Field(default=PromotionKind.PROMOTION, sa_column_kwargs={"server_default": "promotion"})
    #: The new champion's generation; 0 is the base model.
    generation: int
    model_id: str
    #: Relative to the work folder, or absolute for a base model.
    model_path: str
    previous_model_id: str | None = None
    previous_path: str | None = None
    #: What the person, or the daemon that rolled back, gave as the reason.
    reason: str = ""
    #: The numbers of the win as JSON, as in `Run`: on the row, since a run that did not end well may be retried.
    verdict: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: The generation whose model a rollback brought back.
    restored: int | None = None
    created_at: int
    #: The person who approved, forced or rolled back; the daemon's own changes have none.
    approved_by: str | None = None
    #: The outcome of the run whose model was forced.
    overrode: str | None = None
    #: Drops in the snapshot that the model was made from, as JSON; of a base model none.
    drops: list[int] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: `hooks.after_promotion`, then `hooks.health`: state, error, and the end of its output.
    hook_state: str | None = None
    hook_error: str | None = None
    hook_output: str | None = None
    health_state: str | None = None
    health_error: str | None = None
    health_output: str | None = None


class Slot(SQLModel, table=True):
    """One nightly slot of one track; the row is unique, so a slot is used once."""

    __table_args__ = (Index("one_slot_a_night", "track", "due_at", unique=True),)

    id: int | None = Field(default=None, primary_key=True)
    track: str
    due_at: int
    #: `queued` with its run, or `no_new_data`.
    outcome: str
    run_id: int | None = Field(default=None, foreign_key="run.id")


class Event(SQLModel, table=True):
    """Something that happened, written in the same transaction as the change."""

    __table_args__ = (Index("event_dismissals", "at", sqlite_where=text(IS_DISMISSAL)),)

    id: int | None = Field(default=None, primary_key=True)
    at: int = Field(index=True)
    #: A verb: `run_claimed`, `drop_accepted`, `promoted`, `slot_taken`.
    kind: str
    track: str | None = None
    run_id: int | None = Field(default=None, index=True)
    drop_id: int | None = Field(default=None, index=True)
    detail: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON))


class Message(SQLModel, table=True):
    """One message to one address, made from an event or for a day's digest."""

    __table_args__ = (
        one_of("state", MessageState),
        CheckConstraint("(state = 'pending') = (ended_at IS NULL)", name="ended_has_time"),
        Index("one_message_an_event", "event_id", "address", unique=True),
        Index("message_pending", "address", sqlite_where=text("state = 'pending'")),
        Index("message_kinds", "kind", "created_at"),
    )

    #: Messages to one address are sent in the order of their ids.
    id: int | None = Field(default=None, primary_key=True)
    #: `None` for a digest.
    event_id: int | None = Field(default=None, foreign_key="event.id")
    #: The first digits of the hash of its URL, which itself is a secret of the settings.
    address: str
    #: That of its event, or `digest`.
    kind: str
    #: Severity as Apprise names it: info, success, warning, failure.
    level: str
    title: str
    body: str
    state: str = MessageState.PENDING
    created_at: int
    #: Counted before each try.
    tries: int = 0
    #: Not tried before: the end of a back-off.
    not_before: int
    ended_at: int | None = None
    #: The error of the last try; `None` if it did not fail.
    error: str | None = None


class Outbox(SQLModel, table=True):
    """The cursor of the events turned into messages: one row, while addresses are set."""

    id: int | None = Field(default=None, primary_key=True)
    #: Ids of the last event handled, and of the last event before the latest digest.
    event_id: int
    digest_event_id: int
    #: The time of day, in ms since the epoch, of the latest digest.
    digest_at: int


EVERY: tuple[type[SQLModel], ...] = (Track, Drop, Run, Suspect, Attempt, Promotion, Slot, Event, Message, Outbox)
for _kind in EVERY:
    require_types(_kind)
