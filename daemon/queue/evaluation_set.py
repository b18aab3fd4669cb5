"""
The evaluation set of a track: whose pinned files count, and what changed since its previous verdict.

A file in heldout/ changes it, and anybody who may write into the inbox can put one there. So it counts at once only
where the settings judge on pinned files and name its owner; everything else there waits for a person.
"""

import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from sqlalchemy import func, text
from sqlmodel import Session, col, select

from daemon.queue.snapshots import JUDGED
from daemon.settings.model import Settings
from daemon.state.events import record_event
from daemon.state.questions import ACCEPTED_ROWS
from daemon.state.run_files import ArtifactDamaged, load_dataset, load_verdict
from daemon.state.states import CAME_IN, DropState
from daemon.state.tables import Drop, Event, Run, Track
from daemon.system.programs import name_of, user
from pipeline.artifacts import Dataset, Verdict
from pipeline.config import RunConfig, past_setting
from pipeline.contract import YardstickBefore
from pipeline.words import count

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def why_it_waits(settings: Settings, track: str, uid: int, mode: int) -> str | None:
    """
    Return why a file in a track's heldout folder waits for approval; `None` if it counts at once.

    `uid` and `mode` are those of the very file whose bytes were taken: its owner answers for it, unless others could
    write into it.
    """
    gate = settings.track(track).gate
    # A track may name nobody; without a settings file it is the daemon's own user.
    names = gate.pinned_by or settings.gate.pinned_by or (user(),)
    owner = name_of(uid)
    if gate.on != "pinned":
        why = f'gate.on is "{gate.on}"'
    elif not {owner, str(uid)} & set(names):
        why = f"gate.pinned_by is {', '.join(names)}"
    elif mode & _OTHERS_MAY_WRITE:
        why = f"others may write into it (mode {stat.S_IMODE(mode):o})"
    else:
        return None
    return f"it is {owner}'s, and {why}"


def pinned_drops(session: Session, track: str) -> Sequence[str]:
    """Return the sha256 of each accepted pinned drop of a track."""
    of_track = select(Drop.sha256).where(Drop.track == track, Drop.state == DropState.ACCEPTED)
    return session.exec(of_track.where(Drop.role == "heldout")).all()


def records_came(session: Session, settings: Settings, track: str) -> bool:
    """Say whether pinned records wait for a run, on a track that is judged on them and whose last run lacked some."""
    if track not in settings.track_names or settings.track(track).gate.on != "pinned":
        return False
    waiting = select(Drop.id).where(Drop.track == track, Drop.role == "heldout", Drop.state == DropState.ACCEPTED)
    new = session.exec(waiting.where(col(Drop.first_run).is_(None)).limit(1)).first()
    ended = select(Run.outcome).where(Run.track == track, col(Run.outcome).is_not(None))
    last = session.exec(ended.order_by(col(Run.id).desc()).limit(1)).first()
    return new is not None and last == "insufficient_evidence"


def accepted_rows(session: Session, track: str) -> tuple[str | None, dict[str, int]]:
    """Return the metric that a track's first run fixed, and how many rows its accepted drops of each role have."""
    session.flush()
    rows = session.connection().execute(text(ACCEPTED_ROWS), {"track": track})
    return session.get_one(Track, track).metric, {row.role: row.rows for row in rows}


def yardstick_before(session: Session, state_folder: Path, run: Run, champion: str) -> YardstickBefore | None:
    """
    Return what the track's previous verdict was judged on, if `run` is judged on something else.

    That is other pinned drops, or the drops' own shares. `champion` is today's, whose score there is told.
    """
    ended = select(func.max(Event.id)).where(Event.run_id == Run.id, Event.kind == "run_succeeded").scalar_subquery()
    judged = select(Run).where(Run.track == run.track, Run.id != run.id, col(Run.outcome).in_(JUDGED))
    last = session.exec(judged.order_by(ended.desc()).limit(1)).first()
    if last is None or last.config is None or run.config is None:
        return None
    dataset, verdict = _published(state_folder, last.id or 0)
    then, config = past_setting(last.config, "gate", "on"), RunConfig.model_validate(run.config)
    # Before the settings alone said so, a pinned drop did.
    was = _pins(last, pinned=then == "pinned" if dataset is None else dataset.heldout_pinned)
    now = _pins(run, pinned=config.gate.on == "pinned")
    if was == now:
        return None
    shares = 'the drops\' own shares (gate.on = "{}")'
    return YardstickBefore(
        run=last.id or 0,
        records=None if verdict is None else verdict.records,
        champion_score=None if verdict is None else _score(verdict, champion, config.evaluate.metric),
        added=_named(session, now - was) if now else (shares.format(config.gate.on),),
        removed=_named(session, was - now) if was else (shares.format(then),),
    )


def note_change(session: Session, run: Run, verdict: Verdict, now: int) -> None:
    """Record that a run was judged on something else than the one before it, in the transaction that ends it."""
    if verdict.yardstick is not None:
        record_event(session, "yardstick_changed", now, track=run.track, run_id=run.id, words=verdict.yardstick)


def _published(state_folder: Path, run_id: int) -> tuple[Dataset | None, Verdict | None]:
    try:
        return load_dataset(state_folder, run_id), load_verdict(state_folder, run_id)
    except ArtifactDamaged:
        return None, None


def _pins(run: Run, *, pinned: bool) -> set[int]:
    """Return the pinned drops that a run is judged on; none if it is judged on the drops' own shares."""
    return {int(str(drop["id"])) for drop in run.snapshot or () if pinned and drop["role"] == "heldout"}


def _score(verdict: Verdict, model_id: str, metric: str) -> float | None:
    scores = {verdict.candidate_model_id: verdict.candidate_score, verdict.champion_model_id: verdict.champion_score}
    return scores.get(model_id) if verdict.metric == metric else None


def _named(session: Session, drops: Iterable[int]) -> tuple[str, ...]:
    """Return each drop's number and file, and by whose word it counts, or does not any more."""
    rows = [session.get_one(Drop, number) for number in sorted(drops)]
    return tuple(f"drop {row.id} ({row.name}, {count(row.rows, 'row')}{_by_whom(session, row)})" for row in rows)


def _by_whom(session: Session, drop: Drop) -> str:
    """Return who dropped a file and whose word it took, or who withdrew it; what was not noted is not said."""
    events = session.exec(select(Event).where(Event.drop_id == drop.id).order_by(col(Event.id))).all()
    words = [(one.kind, one.detail.get("by")) for one in events if one.detail.get("by")]
    if drop.state == DropState.WITHDRAWN:
        return next((f", withdrawn by {by}" for kind, by in reversed(words) if kind == "drop_withdrawn"), "")
    owner = events[0].detail.get("owner") if events else None
    said = next((f", {kind.removeprefix('drop_')} by {by}" for kind, by in reversed(words) if kind in CAME_IN), "")
    return (f", dropped by {owner}" if owner else "") + said
