"""What a person should look at first, the most urgent first."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal

from daemon.settings.model import Settings
from daemon.storage.free_space import FreeSpace
from daemon.views.champion_history import ChampionView
from daemon.views.details.drop import findings_of
from daemon.views.drop_lineage import DropView
from daemon.views.overview import Overview
from pipeline.artifacts import Frozen
from pipeline.wording import count

Kind = Literal["daemon", "disk", "trouble", "hook", "failed", "rejected", "approval", "blocked", "proposed", "paused"]
#: What has gone wrong longer ago is history.
_RECENT = timedelta(days=7)
_MOST, _MOST_KINDS = 5, 3
#: Who dropped a file says the event that recorded it, and no other.
_CAME_AGAIN = """
SELECT later.id FROM "drop" AS one JOIN "drop" AS later USING (track, role, name_bytes)
JOIN event AS came ON came.drop_id = one.id JOIN event AS again ON again.drop_id = later.id
WHERE one.id = ? AND later.id > one.id
AND json_extract(came.detail, '$.owner') = json_extract(again.detail, '$.owner') LIMIT 1
"""


class Attention(Frozen):
    """One thing that waits for a person, or went wrong."""

    kind: Kind
    title: str
    detail: str = ""
    """Why, or what to do; of a rejected drop its findings with their counts."""
    track: str | None = None
    run: int | None = None
    drop: int | None = None


def attention(settings: Settings, overview: Overview) -> tuple[Attention, ...]:
    """Return what needs a person, the most urgent first; empty if all is well."""
    alive = overview.daemon().alive
    return (
        *_machine(settings, overview, alive=alive),
        *_paused(overview),
        *_commands(settings, overview),
        *_failed(overview),
        *_rejected(settings, overview),
        *_words(settings, overview),
    )


def rejected_words(overview: Overview, drop: DropView) -> str:
    """Say what was wrong with a rejected drop: its findings with their counts, or the reason where none were noted."""
    kinds = findings_of(overview, drop.id)
    told = [f"{one.message} ({count(one.rows, 'row')})" if one.rows > 1 else one.message for one in kinds[:_MOST_KINDS]]
    more = [f"and {count(len(kinds) - _MOST_KINDS, 'other kind')}"] if len(kinds) > _MOST_KINDS else []
    return "; ".join((*told, *more)) or drop.reason or ""


def came_again(overview: Overview, drop: DropView) -> bool:
    """
    Say whether its owner dropped a file of a drop's name again: what was wrong with a rejected one is history then.

    Also where the later one is rejected, too: that one says what is wrong today.
    """
    return bool(overview.rows(_CAME_AGAIN, drop.id))


def _machine(settings: Settings, overview: Overview, *, alive: bool) -> Iterator[Attention]:
    if not alive:
        yield Attention(kind="daemon", title="The daemon is not running", detail="start it: dropforge run")
    shortage = FreeSpace(settings).shortage()
    if shortage:
        yield Attention(kind="disk", title="The disk is nearly full", detail=shortage)
    for whose, words in (overview.troubles() if alive else {}).items():
        yield Attention(kind="trouble", title=f"Trouble with {whose}", detail=words)


def _paused(overview: Overview) -> Iterator[Attention]:
    for one in overview.paused():
        yield Attention(kind="paused", title=f"Track {one.track} is paused", detail=one.words, track=one.track)


def _commands(settings: Settings, overview: Overview) -> Iterator[Attention]:
    for name in settings.track_names:
        champion = overview.champion(name)
        if champion is not None:
            yield from _failed_commands(champion, again=bool(settings.track(name).hooks.after_promotion))


def _failed_commands(champion: ChampionView, *, again: bool) -> Iterator[Attention]:
    for name, one in (("hooks.after_promotion", champion.hook), ("hooks.health", champion.health)):
        if one is not None and one.state == "failed":
            title = f"{name} failed for the champion of track {champion.track}"
            offered = again and name == "hooks.after_promotion"
            hint = f"; to run it again: dropforge hook --track {champion.track}" if offered else ""
            yield Attention(kind="hook", title=title, detail=f"{one.error}{hint}", track=champion.track)


def _failed(overview: Overview) -> Iterator[Attention]:
    found = [run for state in ("failed", "crashed") for run in overview.runs(states=[state], most=_MOST)]
    for run in sorted(found, key=lambda run: -run.id)[:_MOST]:
        if run.ended_at is not None and run.ended_at > _since():
            detail = "; ".join(filter(None, (run.error, run.hint)))
            yield Attention(
                kind="failed", title=f"Run {run.id} {run.state}", detail=detail, track=run.track, run=run.id
            )


def _rejected(settings: Settings, overview: Overview) -> Iterator[Attention]:
    for drop in _newest(settings, overview, "rejected"):
        if drop.received_at > _since() and not came_again(overview, drop):
            title, detail = f"{drop.name} was rejected", rejected_words(overview, drop)
            yield Attention(kind="rejected", title=title, detail=detail, track=drop.track, drop=drop.id)


def _words(settings: Settings, overview: Overview) -> Iterator[Attention]:
    """Yield what waits for a person's word."""
    for run in overview.awaiting():
        title = f"Run {run.id} won and waits for approval"
        yield Attention(kind="approval", title=title, detail=run.sentence or "", track=run.track, run=run.id)
    for run in overview.blocked():
        title = f"Run {run.id} won, but {run.blocker}"
        yield Attention(kind="blocked", title=title, detail=run.sentence or "", track=run.track, run=run.id)
    for drop in _newest(settings, overview, "proposed"):
        title = f"{drop.name} waits for a person before it judges models"
        yield Attention(kind="proposed", title=title, detail=drop.reason or "", track=drop.track, drop=drop.id)


def _newest(settings: Settings, overview: Overview, state: str) -> list[DropView]:
    """Return the newest drops in a state; asked a track at a time, their index finds them among very many."""
    tracks = dict.fromkeys((*settings.track_names, *overview.tracks()))
    found = [drop for name in tracks for drop in overview.drops(name, state, _MOST)]
    return sorted(found, key=lambda drop: -drop.id)[:_MOST]


def _since() -> datetime:
    return datetime.now(UTC) - _RECENT
