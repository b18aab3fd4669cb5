"""
Manual decisions on drops: accept a proposed drop or new answers, withdraw a drop from later runs, restore it.

The drop's file and lineage are kept. (A drop that made a candidate worse is found and suspended by `suspects`.)
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Engine, or_, update
from sqlmodel import Session, col, select

from daemon.queue import run_queue, suspects
from daemon.queue.snapshots import give_back, records_came, waiting_drops
from daemon.settings.model import Settings
from daemon.state.database import transaction, waits
from daemon.state.events import Word, record_event
from daemon.state.states import OPEN_STATES, DropState, RunState
from daemon.state.tables import Drop, Run, Suspect
from pipeline.artifacts import Replacement
from pipeline.errors import DropforgeError


class Withdrawal(NamedTuple):
    """Result of `withdraw`: the drop, the runs cancelled for it, and the run queued for their other new drops."""

    drop: Drop
    cancelled: list[int]
    """Ids of the runs that used the drop or were queued for it: open ones, and wins that waited for approval."""
    queued: int | None
    """Id of the run on the other drops that were new in the cancelled runs; `None` if there is no such run."""

    @property
    def words(self) -> list[str]:
        """The result as sentences for the user."""
        row, begun = self.drop, self.queued
        return [
            f"drop {row.id} ({row.name}) is withdrawn: no later run of track {row.track} uses it",
            *(f"run {run} is cancelled with it" for run in self.cancelled),
            *([] if begun is None else [f"run {begun} is queued: it trains on what else is new, without that drop"]),
        ]


def accept(engine: Engine, drop_id: int, word: Word, settings: Settings) -> Drop:
    """
    Accept a proposed drop, queue the run that it starts (`run_queue.enqueue_for_drop`), and return the drop.

    An event records the decision `word`: reason, time and author. Raises `DropforgeError` if the drop is unknown or not
    proposed, or if the same content is accepted already.
    """
    with transaction(engine) as session:
        drop = _known(session, drop_id)
        if drop.state != DropState.PROPOSED:
            message = f"drop {drop_id} is {drop.state}, not proposed"
            raise DropforgeError(message, "list the files that wait for approval: dropforge drops --state proposed")
        _refuse_twin(session, drop)
        _decide(session, drop, DropState.ACCEPTED, "drop_accepted", word)
        session.flush()
        run_queue.enqueue_for_drop(session, settings, drop, word.at)
        return drop


def note_new_answers(engine: Engine, run: Run, proposals: Iterable[Replacement], now: int) -> None:
    """Store in each drop of a run its number of rows with new answers, 0 without proposals; an event per change."""
    rows: Counter[int] = Counter()
    for proposal in proposals:
        rows[proposal.new] += proposal.rows
    changed = or_(col(Drop.new_answers) > 0, col(Drop.id).in_(rows))
    with transaction(engine) as session:
        for drop in session.exec(select(Drop).where(changed, col(Drop.id).in_(run.snapshot or ()))).all():
            number = rows[drop.id or 0]
            if number != drop.new_answers:
                is_first = not drop.new_answers and not drop.answers_accepted
                kind = "answers_proposed" if is_first else "answers_counted"
                record_event(session, kind, now, track=drop.track, drop_id=drop.id, rows=number)
                drop.new_answers = number
                session.add(drop)


def accept_answers(engine: Engine, drop_id: int, word: Word, settings: Settings) -> Drop:
    """
    Let an accepted drop's new answers to questions of earlier drops count from the next run on; return the drop.

    If a run has begun with it, it counts as new and starts a run; trials of later drops are repeated. An event records
    the decision `word`. A second call changes nothing. Raises `DropforgeError` if the drop is unknown, not accepted or
    on trial, or if its first run has ended and found no new answer in it.
    """
    with transaction(engine) as session:
        drop = _known(session, drop_id)
        if drop.state != DropState.ACCEPTED or suspects.is_on_trial(session, drop):
            state = "on trial" if drop.state == DropState.ACCEPTED else drop.state
            restore = f"wait for its trial, or: dropforge drops restore {drop_id} --reason TEXT"
            hint = restore if state == "on trial" else "see the drops: dropforge drops"
            raise DropforgeError(f"drop {drop_id} is {state}", hint)
        if drop.answers_accepted:
            return drop
        is_open = drop.first_run is not None and session.get_one(Run, drop.first_run).state in OPEN_STATES
        if drop.first_run is not None and not drop.new_answers and not is_open:
            raise DropforgeError(f"drop {drop_id} brings no new answer", "see which do: dropforge drops")
        drop.answers_accepted = True
        session.add(drop)
        _note(session, drop, "answers_accepted", word)
        suspects.leave(session, settings, drop, word.at)
        if drop.first_run is not None:
            drop.first_run = None
            session.flush()
            run_queue.enqueue_for_drop(session, settings, drop, word.at)
        return drop


def withdraw(engine: Engine, drop_id: int, word: Word, settings: Settings) -> Withdrawal:
    """
    Withdraw an accepted, proposed or suspended drop: no later run trains on it or is evaluated on it.

    Returns what was cancelled and queued: open runs and pending wins that were made from the drop are cancelled (a
    running run stops later), and one run is queued for the other drops that were new in them, unless the track runs at
    night only. If no drop is new now, the run that was queued for new drops is cancelled, too. Trials of later drops
    are repeated. A model that was promoted already keeps serving: a person rolls it back. `word` is the decision:
    reason, time and author. Raises `DropforgeError` if the drop is unknown or in another state.
    """
    with transaction(engine) as session:
        drop = _known(session, drop_id)
        if drop.state not in {DropState.ACCEPTED, DropState.PROPOSED, DropState.SUSPENDED}:
            message = f"drop {drop_id} is {drop.state}, not accepted, proposed or suspended"
            raise DropforgeError(message, "see the drops and their states: dropforge drops")
        _decide(session, drop, DropState.WITHDRAWN, "drop_withdrawn", word)
        cancelled = _cancel_made_from(session, drop, word.at)
        suspects.leave(session, settings, drop, word.at)
        begun = None
        if waiting_drops(session, drop.track):
            begun = run_queue.enqueue_when_quiet(session, settings, drop.track, word.at) if cancelled else None
        elif not records_came(session, settings, drop.track):
            cancelled += _cancel_for_new_data(session, drop, word.at)
        return Withdrawal(drop, cancelled, begun.id if begun else None)


def restore(engine: Engine, drop_id: int, word: Word, settings: Settings) -> Drop:
    """
    Accept a withdrawn or suspended drop, or a drop on trial, as if new; queue the run that it starts; return the drop.

    Its trial is cancelled, and it is never put on trial again. An event records the decision `word`: reason, time and
    author. Raises `DropforgeError` if the drop is unknown or in another state, or its content is accepted already.
    """
    with transaction(engine) as session:
        drop = _known(session, drop_id)
        if drop.state not in {DropState.WITHDRAWN, DropState.SUSPENDED} and not suspects.is_on_trial(session, drop):
            message = f"drop {drop_id} is {drop.state}, not withdrawn, suspended or on trial"
            raise DropforgeError(message, "see the drops and their states: dropforge drops")
        _refuse_twin(session, drop)
        _decide(session, drop, DropState.ACCEPTED, "drop_restored", word)
        drop.first_run, drop.restored = None, True
        suspects.leave(session, settings, drop, word.at)
        session.flush()
        run_queue.enqueue_for_drop(session, settings, drop, word.at)
        return drop


def _cancel_made_from(session: Session, drop: Drop, now: int) -> list[int]:
    """
    Cancel the track's open runs and pending wins whose snapshot contains the drop; return their ids, ascending.

    A pending win loses its verdict. The drops that were new in a cancelled run wait for a run again, and so does the
    drop that a cancelled trial tested: if its win was pending, the search for the drop was over, and no other run has
    it.
    """
    going = col(Run.state).in_([RunState.QUEUED, RunState.WAITING, RunState.RUNNING])
    asked = select(Run).where(Run.track == drop.track, or_(going, waits())).order_by(col(Run.id))
    runs = [run for run in session.exec(asked).all() if drop.id in (run.snapshot or ())]
    for run in runs:
        run_queue.call_off(session, run, now, f"drop {drop.id} ({drop.name}) was withdrawn")
        give_back(session, run.id or 0)
        over = Suspect.trial_run == run.id, Suspect.drop_id != drop.id, col(Suspect.ended).is_not(None)
        session.exec(update(Drop).where(col(Drop.id).in_(select(Suspect.drop_id).where(*over))).values(first_run=None))
    return [run.id or 0 for run in runs]


def _cancel_for_new_data(session: Session, drop: Drop, now: int) -> list[int]:
    """Cancel the track's queued run if new drops started it, not a person; return its id in a list, else none."""
    queued = select(Run).where(Run.track == drop.track, Run.state == RunState.QUEUED)
    runs = session.exec(queued.where(col(Run.trigger).in_(["drop", "nightly"]))).all()
    for run in runs:
        run_queue.call_off(session, run, now, f"drop {drop.id} ({drop.name}) was withdrawn, and no other drop is new")
    return [run.id or 0 for run in runs]


def _known(session: Session, drop_id: int) -> Drop:
    drop = session.get(Drop, drop_id)
    if drop is None:
        raise DropforgeError(f"there is no drop {drop_id}", "see them all: dropforge drops")
    return drop


def _refuse_twin(session: Session, drop: Drop) -> None:
    """Raise `DropforgeError` if another drop of the track with the same role and content is accepted already."""
    same = select(Drop).where(Drop.track == drop.track, Drop.role == drop.role, Drop.sha256 == drop.sha256)
    twin = session.exec(same.where(Drop.state == DropState.ACCEPTED, Drop.id != drop.id)).first()
    if twin is not None:
        message = f"the content of drop {drop.id} is accepted already, as drop {twin.id}"
        raise DropforgeError(message, f"to take that one out: dropforge drops withdraw {twin.id} --reason TEXT")


def _decide(session: Session, drop: Drop, state: DropState, kind: str, word: Word) -> None:
    """Set a drop's state, with an event of `kind`; clear its suspension, and its reason unless it is withdrawn."""
    drop.state, drop.suspension = state, None
    drop.reason = word.reason if state == DropState.WITHDRAWN else None
    session.add(drop)
    _note(session, drop, kind, word)


def _note(session: Session, drop: Drop, kind: str, word: Word) -> None:
    reason = word.reason or None
    record_event(session, kind, word.at, track=drop.track, drop_id=drop.id, reason=reason, by=word.by)
