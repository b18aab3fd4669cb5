"""
The evaluation set of a track: which pinned files are accepted at once, and changes since its previous verdict.

A file in heldout/ changes the evaluation set, and anybody who may write into the inbox can put a file there. So a file
is accepted at once only if the settings judge on pinned files and name its owner; every other waits for approval.
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
    Return why a file in a track's heldout folder waits for approval; `None` if it is accepted at once.

    `uid` and `mode` are the owner and the mode of the very file whose bytes were taken. A file that others may write
    always waits.
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
    """
    Return whether an unused pinned drop waits, and the last run ended with `insufficient_evidence`.

    Always `False` unless the track is declared and its `gate.on` is "pinned".
    """
    if track not in settings.track_names or settings.track(track).gate.on != "pinned":
        return False
    waiting = select(Drop.id).where(Drop.track == track, Drop.role == "heldout", Drop.state == DropState.ACCEPTED)
    new = session.exec(waiting.where(col(Drop.first_run).is_(None)).limit(1)).first()
    ended = select(Run.outcome).where(Run.track == track, col(Run.outcome).is_not(None))
    last = session.exec(ended.order_by(col(Run.id).desc()).limit(1)).first()
    return new is not None and last == "insufficient_evidence"


def accepted_rows(session: Session, track: str) -> tuple[str | None, dict[str, int]]:
    """Return the metric fixed by the track's first verdict (or `None`), and the number of accepted rows by role."""
    session.flush()
    rows = session.connection().execute(text(ACCEPTED_ROWS), {"track": track})
    return session.get_one(Track, track).metric, {row.role: row.rows for row in rows}


def yardstick_before(session: Session, state_folder: Path, run: Run, champion: str) -> YardstickBefore | None:
    """
    Return how the evaluation set differs from that of the track's previous verdict; `None` if it does not.

    The evaluation set is the pinned drops, or shares of all drops. `champion` is the id of today's champion, whose
    score on the previous set is included. Also `None` if there is no previous verdict.
    """
    ended = select(func.max(Event.id)).where(Event.run_id == Run.id, Event.kind == "run_succeeded").scalar_subquery()
    judged = select(Run).where(Run.track == run.track, Run.id != run.id, col(Run.outcome).in_(JUDGED))
    last = session.exec(judged.order_by(ended.desc()).limit(1)).first()
    if last is None or last.config is None or run.config is None:
        return None
    dataset, verdict = _published(state_folder, last.id or 0)
    then, config = past_setting(last.config, "gate", "on"), RunConfig.model_validate(run.config)
    # In older versions a run was judged on pinned drops if there were any, whatever `gate.on` said.
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
    """Record an event, in the caller's `session`, if the evaluation set is not that of the previous verdict."""
    if verdict.yardstick is not None:
        record_event(session, "yardstick_changed", now, track=run.track, run_id=run.id, words=verdict.yardstick)


def _published(state_folder: Path, run_id: int) -> tuple[Dataset | None, Verdict | None]:
    try:
        return load_dataset(state_folder, run_id), load_verdict(state_folder, run_id)
    except ArtifactDamaged:
        return None, None


def _pins(run: Run, *, pinned: bool) -> set[int]:
    """Return the ids of the pinned drops that a run is judged on; empty if it is judged on shares of all drops."""
    return {int(str(drop["id"])) for drop in run.snapshot or () if pinned and drop["role"] == "heldout"}


def _score(verdict: Verdict, model_id: str, metric: str) -> float | None:
    scores = {verdict.candidate_model_id: verdict.candidate_score, verdict.champion_model_id: verdict.champion_score}
    return scores.get(model_id) if verdict.metric == metric else None


def _named(session: Session, drops: Iterable[int]) -> tuple[str, ...]:
    """Describe the drops for the user, by ascending id: file name, rows, and who dropped, accepted or withdrew each."""
    rows = [session.get_one(Drop, number) for number in sorted(drops)]
    return tuple(f"drop {row.id} ({row.name}, {count(row.rows, 'row')}{_by_whom(session, row)})" for row in rows)


def _by_whom(session: Session, drop: Drop) -> str:
    """Return who dropped and accepted the drop, or who withdrew it, as a phrase; empty if that was not recorded."""
    events = session.exec(select(Event).where(Event.drop_id == drop.id).order_by(col(Event.id))).all()
    words = [(one.kind, one.detail.get("by")) for one in events if one.detail.get("by")]
    if drop.state == DropState.WITHDRAWN:
        return next((f", withdrawn by {by}" for kind, by in reversed(words) if kind == "drop_withdrawn"), "")
    owner = events[0].detail.get("owner") if events else None
    said = next((f", {kind.removeprefix('drop_')} by {by}" for kind, by in reversed(words) if kind in CAME_IN), "")
    return (f", dropped by {owner}" if owner else "") + said
