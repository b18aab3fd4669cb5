"""
Suspects: new drops that may have made a run worse, and the trial runs that test them.

A verdict that blames the new drops suspends none of them: it puts them on trial. They are tried in turn, each under
another seed, when nothing else is to be run: a trial trains on the champion's drops, those that the search has cleared,
and one suspect, so that drops which only do harm together are found. A trial that blames its drop is followed by a
control, which trains on the champion's drops alone, and the drop is suspended if the trial is worse than that, too: the
champion may have been lucky on these records. A trial that won but for guards of old drops may serve after its control
(`pipeline.decide.verdict.settle`). Every other drop is accepted as before. The rows of `Suspect` and the states of
their runs are the whole state: after a crash a search continues from them.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from daemon.queue import run_queue
from daemon.queue.leave_one_out import accepted, champion_drops, of_training, queue_run, run_again, snapshot_of, trials
from daemon.queue.states import FINAL
from daemon.settings.model import Settings
from daemon.state import run_files
from daemon.state.clauses import Suspension
from daemon.state.database import transaction
from daemon.state.events import record_event
from daemon.state.states import OPEN_STATES, DropState, PromotionKind, Purpose, RunState, SuspectEnd
from daemon.state.tables import Drop, Promotion, Run, Suspect, Track
from daemon.state.troubles import Troubles
from pipeline.artifacts import Verdict
from pipeline.decide import policy

#: Promotes the model of a trial if its control has settled that.
Serve = Callable[[Run], object]


def follow_verdict(  # noqa: PLR0913 - the last goes by name
    session: Session, settings: Settings, run: Run, verdict: Verdict, now: int, *, serve: Serve
) -> None:
    """
    Put new drops on trial, or suspend or clear a drop on trial, as the verdict of `run` requires.

    Called in the transaction that ends the run. The verdict of a run that is no trial may open a search. No drop is
    blamed if the champion is a base model or `gate.trials_per_week` is 0. No search begins if the candidate lacks a
    drop of the champion's, as it was withdrawn, since it may be worse for that; a trial lacks it as its control does. A
    trial that blames its drop leaves it on trial until its control has ended, any other clears it; a trial that does
    not win is repeated if it would be made of other drops now. `serve` gets a trial that is not worse than its control.
    A drop that was suspended or cleared may queue a run. Raises `ArtifactDamaged`.
    """
    if run.about_drop is None:
        if _blames(session, settings, run, verdict):
            _open_search(session, run, now)
        return
    tried = _tried(session, run.track)
    if tried is None or tried.trial_run != (run.control_of or run.id):
        return
    if not _is_valid(session, tried) and (run.control_of or verdict.outcome != "promoted"):
        _take_back(session, tried, now)
    elif run.control_of:
        _judge(session, settings, tried, run, now, serve=serve)
    elif not _blames(session, settings, run, verdict):
        _end(session, settings, tried, now)


def go_on(engine: Engine, settings: Settings, now: int, troubles: Troubles) -> None:
    """
    Queue the next trial or control, or end the search, in each declared track that has drops on trial.

    A trial or control that ended without a verdict clears its drop; if no trial is left for the week, or no drop of the
    champion is accepted any more, all are cleared. A trial that has not begun gets the drops of today's champion.
    Called before a run is claimed: a trial begins when nothing else is due. A track with a running run is left out: its
    drops are in that run. What a track's damaged rows or files raise goes to `troubles`, and the other tracks go on.
    """
    with transaction(engine) as session:
        running = select(Run.track).where(Run.state == RunState.RUNNING)
        suspected = select(Suspect.track).where(col(Suspect.ended).is_(None), col(Suspect.track).not_in(running))
        tracks = session.exec(suspected.distinct()).all()
        for track in sorted(set(tracks) & set(settings.track_names)):
            with troubles.alone(f"trials of track {track}"), session.begin_nested():
                _go_on(session, settings, track, now)


def is_on_trial(session: Session, drop: Drop) -> bool:
    """Return whether the drop is on trial: no run but the trial that tests it may use it."""
    return session.exec(_open().where(Suspect.drop_id == drop.id)).first() is not None


def blamed_run(session: Session, run: Run) -> int | None:
    """
    Return the id of the run whose verdict put the drop of a trial or control on trial, or `None`.

    `None` too unless the trial has the training drops and, but for the seed, the training settings of that run. For a
    control the champion must have these settings, too: else its loss says nothing of the champion's luck.
    """
    suspect = _tried(session, run.track)
    if suspect is None or suspect.trial_run != (run.control_of or run.id):
        return None
    runs = [session.get_one(Run, each) for each in (suspect.trial_run, suspect.blamed_run)]
    drops = [of_training(session, each.snapshot or ()) for each in runs]
    if run.control_of:
        serving = col(Track.champion_generation) == Promotion.generation
        made = select(Run).join(Promotion).join(Track, (col(Track.name) == Promotion.track) & serving)
        runs += session.exec(made.where(Track.name == run.track)).all()
    trained = [_training(each) for each in runs]
    return suspect.blamed_run if drops[0] == drops[1] and trained.count(trained[0]) == len(trained) else None


def leave(session: Session, settings: Settings, drop: Drop, now: int) -> None:
    """
    End the suspicion of a drop that a person restored or withdrew, and cancel its trial and control.

    Call it after the drop's state, or `answers_accepted`, was set. If the drop was the last of its search, a run may be
    queued. The trial of a later drop is repeated if this one counts now, or no more, or its new answers do: whether the
    trial used it or not (`ELDERS`), the control would be trained and judged by other answers to its questions.
    """
    counted = drop.state == DropState.ACCEPTED and is_on_trial(session, drop)
    for suspect in session.exec(_open().where(Suspect.track == drop.track)).all():
        if suspect.drop_id == drop.id:
            _take_back(session, suspect, now)
            suspect.ended = SuspectEnd.CLEARED if drop.state == DropState.ACCEPTED else SuspectEnd.ENDED
            _end(session, settings, suspect, now)
        elif suspect.trial_run and not counted and (drop.id or 0) <= max(_used(session, suspect.trial_run)):
            _take_back(session, suspect, now)


# --- a search for the drop that made a run worse: open, continue, end


def _open_search(session: Session, run: Run, now: int) -> None:
    """
    Put the accepted training drops of a run that the champion lacks on trial, in the order in which they are tested.

    First those that were never tested, in each group the newest first. A drop that a person restored is left out.
    """
    cleared = select(Suspect.drop_id).where(Suspect.track == run.track, col(Suspect.trial_run).is_not(None))
    tried = set(session.exec(cleared).all())
    new = accepted(session, {*(run.snapshot or ())} - champion_drops(session, run.track), ~col(Drop.restored))
    for drop in sorted(new, key=lambda drop: (drop in tried, -drop)):
        session.add(Suspect(track=run.track, drop_id=drop, blamed_run=run.id or 0))
        session.flush()
        record_event(session, "drop_suspected", now, track=run.track, run_id=run.id, drop_id=drop)


def _go_on(session: Session, settings: Settings, track: str, now: int) -> None:
    last = _tried(session, track)
    if last is not None and _is_tried(session, settings, last, now):
        return
    known, budget = champion_drops(session, track), _budget(settings, track)
    for suspect in session.exec(_open().where(Suspect.track == track).order_by(col(Suspect.id))).all():
        if suspect.drop_id not in known and accepted(session, known) and trials(session, track, now) < budget:
            tested = _tested(session, suspect)
            suspect.trial_run = queue_run(session, Purpose.TRIAL, track, suspect.drop_id, now, tested=tested).id
            return
        _end(session, settings, suspect, now)


def _is_tried(session: Session, settings: Settings, suspect: Suspect, now: int) -> bool:
    """Queue a due control, and return whether trial or control is open; else end the suspicion or repeat the trial."""
    trial = run = session.get_one(Run, suspect.trial_run)
    if trial.state == RunState.SUCCEEDED:
        # It blames its drop: else that would have been cleared with its verdict.
        if not _is_valid(session, suspect):
            _take_back(session, suspect, now)
            return False
        control, about = select(Run).where(Run.control_of == trial.id), (suspect.track, suspect.drop_id, now)
        run = session.exec(control).first() or queue_run(session, Purpose.CONTROL, *about, control_of=trial.id)
    elif trial.config is None and trial.state not in FINAL:
        # It has not begun, and another champion may have come since it was queued.
        tested = _tested(session, suspect)
        trial.snapshot = snapshot_of(session, trial, tested)
    if run.state not in FINAL:
        return True
    if run is not trial:
        suspect.trial_run = None
    _end(session, settings, suspect, now)
    return False


def _is_valid(session: Session, suspect: Suspect) -> bool:
    """Return whether the suspect's trial has the drops that it would be made of now."""
    used = of_training(session, _used(session, suspect.trial_run))
    known = champion_drops(session, suspect.track)
    return used - known == _tested(session, suspect) and not accepted(session, known - used)


def _take_back(session: Session, suspect: Suspect, now: int) -> None:
    """Detach the trial from its suspect, so that a new one is queued; cancel it and its control if they are open."""
    trial = suspect.trial_run or 0
    made = select(Run).where((col(Run.id) == trial) | (col(Run.control_of) == trial), col(Run.state).in_(OPEN_STATES))
    for run in session.exec(made.where(~col(Run.cancel_requested))).all():
        run_queue.call_off(session, run, now, f"the trial of drop {suspect.drop_id} counts no more")
    suspect.trial_run = None


def _judge(  # noqa: PLR0913 - the last goes by name
    session: Session, settings: Settings, suspect: Suspect, control: Run, now: int, *, serve: Serve
) -> None:
    """
    Suspend the drop if its trial was worse than the control, too, else clear it; clear the search's other suspects.

    A trial that was not worse goes to `serve`, if both were compared on any group of records. The others are cleared as
    the champion may have been lucky on these records, on which every further trial would be compared with it. If the
    control's evaluation has no scores of the trial, a new trial follows, and no suspicion ends.
    """
    evaluation = run_files.load_evaluation(settings.work_folder, control.id or 0)
    scores, trial, end = None if evaluation is None else evaluation.trial, suspect.trial_run, SuspectEnd.CLEARED
    if evaluation is not None and scores is None:
        _take_back(session, suspect, now)
        return
    if scores is not None and policy.suspends(scores):
        drop, end = session.get_one(Drop, suspect.drop_id), SuspectEnd.SUSPENDED
        suspension = Suspension(
            blamed_run=suspect.blamed_run,
            trial=trial or 0,
            tested=tuple(sorted(_tested(session, suspect))),
            control=control.id or 0,
            scores=scores,
        )
        drop.state, drop.suspension = DropState.SUSPENDED, suspension.model_dump(mode="json")
        session.add(drop)
        record_event(session, "drop_suspended", now, track=drop.track, run_id=trial, drop_id=drop.id)
    elif scores is not None and scores.groups:
        serve(session.get_one(Run, trial))
    others = _open().where(Suspect.blamed_run == suspect.blamed_run, Suspect.id != suspect.id)
    for other in session.exec(others).all():
        _end(session, settings, other, now)
    suspect.ended = end
    _end(session, settings, suspect, now)


def _end(session: Session, settings: Settings, suspect: Suspect, now: int) -> None:
    """
    End the suspicion of one drop, as cleared unless `suspect.ended` is set; after a search's last one, queue a run.

    A run is queued if a drop was suspended or withdrawn, or a trial won: otherwise it would only repeat the same data
    against the same champion.
    """
    suspect.ended = suspect.ended or SuspectEnd.CLEARED
    session.add(suspect)
    session.flush()
    run, track, end = suspect.trial_run or suspect.blamed_run, suspect.track, str(suspect.ended)
    record_event(session, "suspicion_ended", now, track=track, run_id=run, drop_id=suspect.drop_id, end=end)
    search = session.exec(select(Suspect).where(Suspect.blamed_run == suspect.blamed_run)).all()
    of_trials = col(Promotion.run_id).in_([each.trial_run for each in search])
    won = session.exec(select(Promotion.id).where(of_trials, Promotion.kind == PromotionKind.PROMOTION)).first()
    taken = any(each.ended in {SuspectEnd.SUSPENDED, SuspectEnd.ENDED} for each in search)
    if all(each.ended is not None for each in search) and (won or taken):
        run_again(session, settings, suspect.track, now)


# --- queries


def _open() -> SelectOfScalar[Suspect]:
    return select(Suspect).where(col(Suspect.ended).is_(None))


def _tried(session: Session, track: str) -> Suspect | None:
    """Return the suspect of a track that is on trial and has a trial's run; `None` if there is none."""
    return session.exec(_open().where(Suspect.track == track, col(Suspect.trial_run).is_not(None))).first()


def _blames(session: Session, settings: Settings, run: Run, verdict: Verdict) -> bool:
    """
    Return whether a verdict puts new drops on trial, or leaves one there: it blames them, and trials are allowed.

    `False` also if the champion is a base model, or if the run, unless it is a trial, lacks a drop of the champion's.
    """
    known, used = champion_drops(session, run.track), of_training(session, run.snapshot or ())
    comparable = run.about_drop is not None or known <= used
    return verdict.blames_new_drops and bool(known) and comparable and _budget(settings, run.track) > 0


def _tested(session: Session, suspect: Suspect) -> set[int]:
    """Return the ids of the drops that a trial adds to the champion's: the suspect, and those its search cleared."""
    cleared = select(Suspect.drop_id).join(Run, col(Run.id) == Suspect.trial_run).where(Run.state == RunState.SUCCEEDED)
    cleared = cleared.where(Suspect.blamed_run == suspect.blamed_run, Suspect.ended == SuspectEnd.CLEARED)
    return {suspect.drop_id} | accepted(session, session.exec(cleared).all()) - champion_drops(session, suspect.track)


def _budget(settings: Settings, track: str) -> int:
    """Return how many trials a track may begin in seven days (`gate.trials_per_week`)."""
    declared = settings.track(track) if track in settings.track_names else settings
    return declared.gate.trials_per_week


def _training(run: Run) -> dict[str, Any]:
    """Return the settings by which a run's model was trained, but for the seed."""
    train: Any = (run.config or {}).get("train") or {}
    return {**train, "seed": None}


def _used(session: Session, run_id: int | None) -> set[int]:
    return {*(session.get_one(Run, run_id).snapshot or ())}
