"""
A track's champions on watch: each later drop compares them with one former champion, once, whatever wins meanwhile.

`pipeline.decide.watch` has the test. A change of champion that is no win ends the watch; another one begins with the
next fresh drop.
"""

from collections.abc import Sequence

from sqlalchemy import text
from sqlmodel import Session, col, select

from daemon.state.events import record_event
from daemon.state.questions import WATCHED
from daemon.state.states import PromotionKind
from daemon.state.tables import Drop, Event, Promotion, Run, Track
from pipeline.artifacts import Evaluation, ModelRef
from pipeline.decide.policy import WATCH_NOTICE, WATCH_RETURN
from pipeline.decide.watch import Watch, watch_of

#: `Event.kind` of evidence that reached a limit.
_EVENTS = {WATCH_NOTICE: "champion_doubted", WATCH_RETURN: "return_proposed"}


def read_watch(session: Session, track: str) -> Watch | None:
    """Return the watch of a track; `None` without one, or without a drop that counts."""
    return watch_of(session.connection().execute(text(WATCHED), {"track": track}).all())


def watch_fields(
    session: Session, run: Run, past: Sequence[Promotion], former: Sequence[ModelRef]
) -> dict[str, object]:
    """
    Return a spec's fields `watched`, a former champion, and `fresh_drops`, the ids of the drops to compare it on.

    It is the same one until its watch is over, else the latest. Fresh are the run's drops that are newer than all drops
    of both champions and were never compared. Empty without a former champion to watch: `former` are those of `past`
    that may serve again, the latest first, without base models and what served before the latest base model.
    """
    base = max((row.generation for row in past if row.kind == PromotionKind.BASE), default=0)
    able = [model for model in former if model.generation > base and model.drops is not None]
    watch = read_watch(session, run.track)
    if not able:
        return {}
    same = [model for model in able if watch and model.generation == watch.former and not watch.is_over]
    watched = (same or able)[0]
    known = max([0, *(past[-1].drops or ()), *(watched.drops or ())])
    new = col(Drop.id).in_(run.snapshot or ()), col(Drop.id) > known, col(Drop.watch_run).is_(None)
    return {"watched": watched, "fresh_drops": session.exec(select(Drop.id).where(*new)).all()}


def note_watch(session: Session, run: Run, compared: Evaluation, now: int) -> None:
    """
    Store the points of an ending run's fresh drops in their rows; begin a watch if its former champion is a new one.

    An event is recorded once per watch and limit that is reached. Nothing is stored if a later run's points are stored
    already, as with a retried run: nights are in the order of their runs.
    """
    later = select(Drop.id).where(Drop.track == run.track, col(Drop.watch_run) > (run.id or 0))
    if session.exec(later).first() is not None:
        return
    track = session.get_one(Track, run.track)
    if track.watch_former != compared.watched:
        track.watch_former, track.watch_since = compared.watched, run.id
    for drop in session.exec(select(Drop).where(col(Drop.id).in_(compared.watch))):
        drop.watch_points, drop.watch_run = compared.watch[drop.id or 0], run.id
    session.flush()
    watch = read_watch(session, run.track)
    kind = _EVENTS.get(watch.reached) if watch else None
    told = select(Event.id).where(Event.track == run.track, Event.kind == kind, col(Event.run_id) >= track.watch_since)
    if watch and kind and session.exec(told).first() is None:
        record_event(session, kind, now, track=run.track, run_id=run.id, watch=watch.model_dump())
