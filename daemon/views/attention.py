"""The list of entries that need a person, most urgent first, and how an entry is dismissed."""

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from typing import Any, Literal

from pydantic import computed_field
from sqlalchemy import Engine

from daemon.settings.model import Settings
from daemon.state.clauses import watch_clauses
from daemon.state.database import transaction
from daemon.state.events import Word, record_event
from daemon.state.questions import IS_DISMISSAL, NEW_ANSWERS
from daemon.storage.disk import Disk
from daemon.system.clock import now_ms
from daemon.views.champion_history import ServingView
from daemon.views.drops import findings_of
from daemon.views.overview import Overview
from daemon.views.reader import NotThere, utc
from daemon.views.runs import RunView
from pipeline.artifacts import Frozen
from pipeline.data_words import proposed_words
from pipeline.words import count

_Condition = Literal["daemon", "disk", "trouble", "hook", "return", "paused"]
Kind = _Condition | Literal["failed", "rejected", "approval", "blocked", "proposed", "answers"]
#: Failures and rejections of longer ago are left out.
_RECENT = timedelta(days=7)
#: A lasting condition (no daemon, a pause) is listed again this long after it was dismissed.
_LASTING = timedelta(days=1)
#: In ms; older dismissals are ignored.
_DISMISSED_FOR = 90 * 24 * 3_600_000
#: Most entries of a kind that are listed; most that are read; most kinds of findings named for a rejected drop.
_MOST, _MOST_LOOKED_AT, _MOST_KINDS = 5, 100, 3
#: Kinds of which `_MOST` are listed: one more in words, several, and the command that lists them all.
_CUT: dict[Kind, tuple[str, str, str]] = {
    "failed": ("run failed", "runs failed", "dropforge runs --state failed"),
    "rejected": ("file was rejected", "files were rejected", "dropforge drops --state rejected"),
    "proposed": ("file waits for a person", "files wait for a person", "dropforge drops --state proposed"),
    "answers": ("drop brings new answers", "drops bring new answers", "dropforge drops"),
}
#: `Event.kind` of a dismissal.
DISMISSED = "attention_dismissed"
_DISMISSALS = f"SELECT at, detail FROM event WHERE {IS_DISMISSAL} AND at > ? ORDER BY at"  # noqa: S608 - our own words
#: The newest rejected drops, but for those whose owner dropped a later file of that name. States are
#: literals, so that SQLite uses the small indexes of these drops.
_REJECTED = """
SELECT id, track, name, reason, received_at FROM "drop" AS one WHERE state = 'rejected' AND received_at > ?
AND NOT EXISTS (
    SELECT 1 FROM "drop" AS later WHERE later.owner = one.owner
    AND later.track = one.track AND later.role = one.role AND later.name_bytes = one.name_bytes AND later.id > one.id
) ORDER BY received_at DESC, id DESC LIMIT ?
"""
_PROPOSED = """
SELECT id, track, name, reason, received_at FROM "drop" WHERE state = 'proposed' ORDER BY id DESC LIMIT ?
"""
_ANSWERS = f"""
SELECT id, track, name, new_answers, received_at FROM "drop" WHERE {NEW_ANSWERS} ORDER BY id DESC LIMIT ?
"""  # noqa: S608 - our own words


class Attention(Frozen):
    """One entry that needs a person: a decision that waits, a failure, or a lasting condition."""

    kind: Kind
    title: str
    detail: str = ""
    """Why, or what to do; of a rejected drop its findings with their counts."""
    track: str | None = None
    run: int | None = None
    drop: int | None = None
    since: datetime | None = None
    """When it happened; `None` for what lasts."""
    count: int = 1
    """How many runs or drops it stands for: more than one where a list is cut short."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def key(self) -> str:
        """Identifier for `dismiss`: KIND-ID of its run or drop; if it has neither, KIND and a hash of its title."""
        return f"{self.kind}-{self.run or self.drop or hashlib.sha256(self.title.encode()).hexdigest()[:6]}"


def attention(settings: Settings, overview: Overview) -> tuple[Attention, ...]:
    """
    Return the entries that need a person, most urgent first; empty if there are none.

    A dismissed entry is left out until it happens again, for 90 days at most; a lasting condition, such as a pause, for
    a day. Failed runs and rejected files older than a week are left out, and rejected files that their owner dropped
    again. At most five failed runs, rejected files, proposed files and drops with new answers each are listed, and one
    more entry counts the others. Raises `DropforgeError` if the state folder cannot be read.
    """
    rows = overview.rows(_DISMISSALS, now_ms() - _DISMISSED_FOR)
    dismissed = {str(row.detail["key"]): utc(row.at) for row in rows}
    listed: list[Attention] = []
    for kind, entries in groupby(chain(_lasting(settings, overview), _ended(overview)), lambda entry: entry.kind):
        every = list(entries)
        left = [entry for entry in every if not _is_dismissed(entry, dismissed)]
        if len(left) > _MOST and kind in _CUT:
            one_more, more_words, command = _CUT[kind]
            more = len(left) - _MOST
            least = "At least " if len(every) == _MOST_LOOKED_AT else ""
            title = f"{least}{count(more, f'more {one_more}', f'more {more_words}')}"
            left[_MOST:] = [Attention(kind=kind, title=title, detail=f"list them: {command}", count=more)]
        listed += left
    for index, entry in enumerate(listed):
        if entry.kind == "rejected" and entry.drop is not None:  # asked only for those that are listed
            listed[index] = entry.model_copy(update={"detail": rejected_words(overview, entry.drop, entry.detail)})
    return tuple(entry for entry in listed if not _is_dismissed(entry, dismissed))


def dismiss(engine: Engine, settings: Settings, overview: Overview, key: str, word: Word) -> Attention:
    """Record that `word.by` dismissed the listed entry `key`; return the entry. Raises `NotThere` if none is listed."""
    entry = next((entry for entry in attention(settings, overview) if entry.key == key), None)
    if entry is None:
        raise NotThere(f"nothing that needs attention is called {key}", "see what does: dropforge attention")
    with transaction(engine) as session:
        record_event(session, DISMISSED, word.at, track=entry.track, key=key, title=entry.title, by=word.by)
    return entry


def _is_dismissed(entry: Attention, dismissed: Mapping[str, datetime | None]) -> bool:
    at = dismissed.get(entry.key)
    return at is not None and at >= (entry.since or datetime.now(UTC) - _LASTING)


def rejected_words(overview: Overview, drop: int, reason: str | None) -> str:
    """Return up to three kinds of a rejected drop's errors with row counts, and how many more; else `reason` or ""."""
    kinds = findings_of(overview, drop)
    named = kinds[:_MOST_KINDS]
    nouns = ["row" if kind.turn is None else "turn" for kind in named]
    words = [
        f"{kind.message} ({count(kind.rows, noun)})" if kind.rows > 1 else kind.message
        for kind, noun in zip(named, nouns, strict=True)
    ]
    more = [f"and {count(len(kinds) - _MOST_KINDS, 'other kind')}"] if len(kinds) > _MOST_KINDS else []
    return "; ".join((*words, *more)) or reason or ""


def _lasting(settings: Settings, overview: Overview) -> Iterator[Attention]:
    """Yield the conditions that last until somebody mends them, grouped by kind, the most urgent kind first."""
    alive = overview.daemon().alive
    if not alive:
        yield Attention(kind="daemon", title="The daemon is not running", detail="start it: dropforge run")
    shortage = Disk(settings).shortage()
    if shortage:
        yield Attention(kind="disk", title="The disk is nearly full", detail=shortage)
    for whose, words in (overview.troubles() if alive else {}).items():
        yield Attention(kind="trouble", title=f"Trouble with {whose}", detail=words)
    for pause in overview.paused():
        yield Attention(kind="paused", title=f"Track {pause.track} is paused", detail=pause.words, track=pause.track)
    champions = overview.champions(settings.track_names)
    for champion in champions:
        yield from _failed_hooks(settings, champion)
    for track, watch in ((champion.track, champion.watch) for champion in champions if champion.watch):
        if clauses := watch_clauses(track, watch):
            title = f"Generation {watch.former} of track {track} may be better than the champion"
            yield Attention(kind="return", title=title, detail="; ".join(clauses), track=track)


def _ended(overview: Overview) -> Iterator[Attention]:
    """Yield the runs and drops that need a person, grouped by kind, the most urgent kind first."""
    since = datetime.now(UTC) - _RECENT
    for run in overview.runs(states=("failed", "crashed"), most=_MOST_LOOKED_AT):
        if run.ended_at is not None and run.ended_at > since:
            yield _of_run("failed", run, f"Run {run.id} {run.state}", "; ".join(filter(None, (run.error, run.hint))))
    for drop in overview.rows(_REJECTED, round(since.timestamp() * 1000), _MOST_LOOKED_AT):
        yield _of_drop("rejected", drop, f"{drop.name} was rejected", drop.reason)
    for run in overview.wins(blocked=False):
        yield _of_run("approval", run, f"Run {run.id} won and waits for approval", run.sentence or "")
    for run in overview.wins(blocked=True):
        yield _of_run("blocked", run, f"Run {run.id} won, but {run.blocker}", run.sentence or "")
    for drop in overview.rows(_PROPOSED, _MOST_LOOKED_AT):
        yield _of_drop("proposed", drop, f"{drop.name} waits for a person before it judges models", drop.reason)
    for drop in overview.rows(_ANSWERS, _MOST_LOOKED_AT):
        what = f"{drop.name}: {proposed_words(drop.new_answers)}"
        yield _of_drop("answers", drop, what, f"to let them count: dropforge drops accept {drop.id} --answers")


def _failed_hooks(settings: Settings, champion: ServingView) -> Iterator[Attention]:
    track = champion.track
    again = f"; to run it again: dropforge hook --track {track}" if settings.track(track).hooks.after_promotion else ""
    hooks = (("hooks.after_promotion", champion.hook, again), ("hooks.health", champion.health, ""))
    for name, hook, hint in hooks:
        if hook is not None and hook.state == "failed":
            title = f"{name} failed for the champion of track {track}"
            yield Attention(kind="hook", title=title, detail=f"{hook.error}{hint}", track=track)


def _of_run(kind: Kind, run: RunView, title: str, detail: str) -> Attention:
    return Attention(kind=kind, title=title, detail=detail, track=run.track, run=run.id, since=run.ended_at)


def _of_drop(kind: Kind, drop: Any, title: str, why: str | None) -> Attention:
    since = utc(drop.received_at)
    return Attention(kind=kind, title=title, detail=why or "", track=drop.track, drop=drop.id, since=since)
