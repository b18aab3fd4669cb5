"""
Keep the outcome of each drop in `NAME.verdict.txt` next to its receipt, rewritten whenever it changes.

A text is derived from the database, the settings and what runs published, and written if it differs from the file, so
a crash loses nothing: the daemon checks all drops once at its start, and afterwards those that a new event may concern.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from sqlalchemy import Engine, func, or_, text
from sqlalchemy.orm import defer
from sqlmodel import Session, col, select

from daemon.inbox.answers.receipts import RECEIPT, home_of, iso_time, names_for
from daemon.inbox.answers.remarks import begins_when, use_of_pinned
from daemon.inbox.drop_folders import Folder
from daemon.inbox.folders import InboxFolders, read_own, writing
from daemon.settings.model import Settings
from daemon.state.clauses import change_clauses, drop_clauses, preview_clauses, verdict_clauses
from daemon.state.database import rows_of, transaction
from daemon.state.questions import CHAMPIONS, GAVE_BACK, PREPARED, SNAPSHOT
from daemon.state.run_files import readable_dataset
from daemon.state.states import AWAITING, OVERTAKEN, DropState, RunState
from daemon.state.tables import Drop, Event, Promotion, Run, Suspect, Track
from pipeline import durable
from pipeline.data_words import left_out_words, proposed_words, warning_words
from pipeline.decide.explain import sentence
from pipeline.words import count, printable, worth_words

VERDICT = ".verdict.txt"
#: States with a verdict note; of rejected and duplicate drops the receipt or error list is final.
_NOTED = (DropState.ACCEPTED, DropState.PROPOSED, DropState.WITHDRAWN, DropState.SUSPENDED)
#: Most drops handled by one `refresh`, and most names tried to find a receipt.
_AT_ONCE, _MOST_NAMES = 20, 25
_AGAIN = "It is trained on again, together with the next drops."
#: The latest run that used a drop, of those since its first one.
_LAST_RUN = """
SELECT run.id FROM run, json_each(run.snapshot) AS held
WHERE run.track = :track AND run.id >= :first AND held.value = :drop
ORDER BY run.id DESC LIMIT 1
"""
#: Rows and records of the drops that a run used.
_ROWS = text(f"SELECT sum(rows), sum(records) FROM ({SNAPSHOT})")  # noqa: S608 - our own words


class TrackPast(NamedTuple):
    """What a track's champions were trained on, read once for many drops; valid until the track's next event."""

    first: Mapping[int, Promotion]
    """The first promotion of a model that was trained on a drop, by the id of the drop."""
    champion: frozenset[int]
    """Ids of the drops in the snapshot that the current champion was trained on."""


def _past_of(session: Session, track: str) -> TrackPast:
    first: dict[int, Promotion] = {}
    drops: list[int] | None = None
    for promotion in rows_of(session, Promotion, CHAMPIONS, track=track).all():
        session.expunge(promotion)  # it outlives the session
        drops = promotion.drops
        for drop in drops or ():
            first.setdefault(drop, promotion)
    return TrackPast(first, frozenset(drops or ()))


class VerdictNotes:
    """Keeps the verdict notes of all drops up to date; used by one thread."""

    def __init__(self, engine: Engine, settings: Settings, inbox: InboxFolders) -> None:
        """Read champions and drops from the database of `engine`; all drops that get a note are pending at first."""
        self._engine, self._settings, self._inbox = engine, settings, inbox
        with transaction(engine) as session:
            self._seen = session.exec(select(func.max(Event.id))).one() or 0
            noted = select(Drop.id).where(col(Drop.state).in_(_NOTED))
            self._pending = {number for number in session.exec(noted) if number}
            self._pasts = {track: _past_of(session, track) for track in session.exec(select(Track.name))}

    def refresh(self) -> bool:
        """
        Write the notes that changed, of the 20 newest pending drops; return whether more drops are pending.

        A drop without a receipt gets no note. Raises `OSError` if the disk is full, or a database error; the next call
        then handles the same drops again. Other errors of writing are logged.
        """
        with transaction(self._engine) as session:
            self._look_at_events(session)
            batch = sorted(self._pending, reverse=True)[:_AT_ONCE]
            drops = session.exec(select(Drop).where(col(Drop.id).in_(batch), col(Drop.state).in_(_NOTED))).all()
            pasts = [self._pasts.get(drop.track) or _past_of(session, drop.track) for drop in drops]
            texts = [tell(session, self._settings, drop, past) for drop, past in zip(drops, pasts, strict=True)]
        for drop, words in zip(drops, texts, strict=True):
            self._write(drop, words)
        self._pending.difference_update(batch)
        return bool(self._pending)

    def _look_at_events(self, session: Session) -> None:
        """Mark the drops as pending that the events since the last call may concern."""
        # Of the steps only prepare has news for a note: what it left out.
        prepared = (col(Event.kind) == "step_published") & (col(Event.detail)["step"].as_string() == "prepare")
        kinds = or_(prepared, col(Event.kind).not_like("step!_%", escape="!"))
        asked = select(Event).where(col(Event.id) > self._seen, kinds)
        asked = asked.options(defer(Event.detail))  # type: ignore[arg-type]
        events = session.exec(asked.order_by(col(Event.id))).all()
        self._pending |= {event.drop_id for event in events if event.drop_id}
        # A new drop changes no other drop's text; otherwise a thousand new drops would be worded a thousand times each.
        ran = {event.track for event in events if event.run_id and not event.kind.startswith("drop_")}
        for track in {event.track for event in events if event.track}:
            former, past = self._pasts.get(track), _past_of(session, track)
            self._pasts[track] = past
            self._pending |= past.champion ^ (former.champion if former else frozenset())
            if track in ran:
                noted = select(Drop.id).where(Drop.track == track, col(Drop.state).in_(_NOTED))
                # Drops that the champion was trained on have their verdict already.
                self._pending |= {number for number in session.exec(noted) if number} - past.champion
        self._seen = max((event.id or 0 for event in events), default=self._seen)

    def _write(self, drop: Drop, words: str) -> None:
        """Write a drop's note next to its receipt, if it has one, when it differs. Raises `OSError` at a full disk."""
        with writing("verdict_not_written", drop=drop.id):
            folder = self._inbox.answers_there(*home_of(drop), user=drop.owner)
            name = folder and name_with(RECEIPT, folder, drop)
            if folder and name:
                data, path = words.encode(), folder.path / f"{name}{VERDICT}"
                if read_own(folder, path.name) != data:
                    durable.write_bytes(path, data)


def name_with(ending: str, folder: Folder, drop: Drop) -> str | None:
    """Return a drop's file name in `folder`, found by its own document NAME + `ending`, or `None`. Raises `OSError`."""
    for name in map(os.fsdecode, itertools.islice(names_for(drop.name_bytes, drop.id or 0), _MOST_NAMES)):
        with suppress(ValueError, RecursionError, AttributeError):  # a dropped file of such a name
            document = json.loads(read_own(folder, name + ending) or b"{}")
            if (document.get("drop"), document.get("content_sha256", document.get("sha256"))) == (drop.id, drop.sha256):
                return name
    return None


def tell(session: Session, settings: Settings, drop: Drop, past: TrackPast) -> str:
    """Return the note of a drop that is accepted, proposed, withdrawn or suspended; `past` is that of its track."""
    head = f"{drop.name}: drop {drop.id} of track {drop.track}, {count(drop.rows, 'row')}"
    if drop.records not in {0, drop.rows}:
        head += f" with {count(drop.records, 'record')}"
    # Reasons and labels are untrusted text, and the note may be shown in a terminal.
    agreement = "; ".join(preview_clauses(drop))
    before = [f"Before any training: {agreement}."] if agreement else []
    sentences = "\n".join(map(printable, [*_sentences(session, settings, drop, past), *before]))
    return f"{head}, received {iso_time(drop.received_at)}\n\n{sentences}\n"


def _sentences(session: Session, settings: Settings, drop: Drop, past: TrackPast) -> Iterator[str]:
    """Yield the sentences of a drop's note, the outcome first."""
    if drop.state == DropState.PROPOSED:
        yield f"It waits for a person, who lets it count or not: dropforge drops accept {drop.id}."
        yield f"Why: {drop.reason}."
    elif drop.state == DropState.ACCEPTED and drop.role == "heldout":
        yield f"Accepted: {use_of_pinned(settings, drop.track)}."
        yield from _new_answers(session, settings, drop)
    elif drop.state == DropState.ACCEPTED:
        suspects = select(Suspect).where(Suspect.drop_id == drop.id).order_by(col(Suspect.id).desc())
        suspect = session.exec(suspects).first()
        if suspect is not None and suspect.ended is None:
            yield from _on_trial(suspect)
            return
        if drop.id in past.champion:
            yield "In use: the model that serves was trained on it."
            first = past.first[drop.id]
            yield _how_it_came(first)
            yield from _left_out(session, settings, session.get(Run, first.run_id or 0))
            if drop.worth_points is not None and drop.worth_half_width is not None:
                words = worth_words(drop.worth_points, drop.worth_half_width)
                yield f"It is worth {words}: run {drop.worth_run} was trained without it."
                # The mean changes with other drops' runs, and the note of this one stays.
                yield "The champion's luck is in the worth of each drop. Compare it with the mean: dropforge drops."
        else:
            yield from _not_serving(session, settings, drop, past)
        yield from _new_answers(session, settings, drop)
    else:
        yield from _taken_out(drop, past)


def _on_trial(suspect: Suspect) -> Iterator[str]:
    turn = "It is tried when nothing else is to be run"
    if suspect.trial_run is not None:
        turn = f"Run {suspect.trial_run} is its trial"
    yield f"On trial: run {suspect.blamed_run} was worse or lost on old drops, and this drop may be the reason."
    yield f"{turn}, on the data of the model that serves, this drop and those that were tried before it."
    yield "Until this is decided no other run uses it."
    yield "If the trial does so, too, a control without new drops is trained."
    yield "If the trial is also worse than the control, the drop is suspended; if not, it is used as before."
    yield "A trial that only guards of old drops stopped may serve after its control."
    yield "Nothing needs to be done."


def _how_it_came(first: Promotion) -> str:
    return f"Run {first.run_id} was trained on it, and its model was {sentence(change_clauses(first))}."


def _not_serving(session: Session, settings: Settings, drop: Drop, past: TrackPast) -> Iterator[str]:
    """Yield the outcome of the latest run that used an accepted drop which the champion was not trained on."""
    run, first = _last_run(session, drop), past.first.get(drop.id or 0)
    if first is not None and run is not None and (run.id == first.run_id or run.outcome == "promoted"):
        yield "Not in use any more: the model that serves was not trained on it."
        yield _how_it_came(first)
        yield _AGAIN
    elif run is None:
        yield f"Accepted: it waits for the next run of track {drop.track}, which {begins_when(settings, drop.track)}."
    else:
        yield from _after_run(run)
        yield from _left_out(session, settings, run)


def _left_out(session: Session, settings: Settings, run: Run | None) -> Iterator[str]:
    """Yield what a run left out of its data, and the warnings about it; nothing without prepared data, or a run."""
    data = readable_dataset(settings.work_folder, run.id or 0) if run else None
    if run and data is not None:
        left = left_out_words(data)
        rows, records = (number or 0 for number in session.execute(_ROWS, {"run": run.id}).one())
        # Each answer of a conversation is a row of the run.
        all_ = count(rows, "row") + (f" with {count(records, 'record')}" if records > rows else "")
        yield from [f"Run {run.id} left out, of {all_} in all: {left}."] if left else []
        yield from (f"{words[0].upper()}{words[1:]}." for words in warning_words(data))


def _new_answers(session: Session, settings: Settings, drop: Drop) -> Iterator[str]:
    """Yield, unless accepted, how many new answers to old questions a drop brings, the command for it, and examples."""
    if not drop.new_answers or drop.answers_accepted:
        return
    words = proposed_words(drop.new_answers)
    yield f"{words[0].upper()}{words[1:]}. They are not used, the old ones are."
    yield f"Whoever runs Dropforge can let them count: dropforge drops accept {drop.id} --answers."
    last = session.scalars(text(PREPARED), {"track": drop.track}).first()
    data = readable_dataset(settings.work_folder, last) if last else None
    for pair in data.proposed_answers if data else ():
        if pair.new_drop == drop.id:
            yield f"  {pair.old_prompt}"
            yield f"    drop {pair.old_drop}: {pair.old_answer}"
            yield f"    new: {pair.new_answer}"


def _last_run(session: Session, drop: Drop) -> Run | None:
    """Return the latest run that used `drop` since it was accepted, even one without a verdict; or `None`."""
    named = {"track": drop.track, "drop": drop.id}
    if drop.first_run is None:
        number = session.scalars(text(GAVE_BACK), named).first()
    else:
        number = session.scalars(text(_LAST_RUN), {**named, "first": drop.first_run}).first()
    return None if number is None else session.get_one(Run, number)


def _after_run(run: Run) -> Iterator[str]:
    verdict = verdict_clauses(run)
    measured = "; ".join(verdict[1:])
    if run.state in {RunState.RUNNING, RunState.WAITING}:
        yield f"In run {run.id}, which has not ended: what comes of it will stand here."
    elif run.state in {RunState.FAILED, RunState.CRASHED}:
        yield f"No verdict yet: run {run.id}, which held it, {run.state}: {run.error}."
        yield f"Whoever runs Dropforge can let it go on: dropforge retry {run.id}. {_AGAIN}"
    elif run.state == RunState.CANCELLED:
        yield f"No verdict yet: run {run.id}, which held it, was cancelled. {_AGAIN}"
    elif run.outcome == AWAITING:
        yield f"It won: run {run.id} was trained on it and is better: {measured}."
        yield f"Its model serves once a person lets it: dropforge promote {run.id}."
    elif run.outcome == OVERTAKEN:
        yield f"Not in use: run {run.id} was trained on it and won ({measured}), but another model came first."
        yield _AGAIN
    else:
        yield f"Not in use: run {run.id} held it, and its model was not promoted: {sentence(verdict)}."
        yield f"{_AGAIN} Why it was not, and what to do: dropforge report {run.id}."


def _taken_out(drop: Drop, past: TrackPast) -> Iterator[str]:
    """Yield why a drop is withdrawn or suspended, whether the champion was trained on it, and how to restore it."""
    why, *more = drop_clauses(drop) or [""]
    yield f"{drop.state.capitalize()}{f': {why}' if why else ''}."
    yield from (f"{clause[0].upper()}{clause[1:].rstrip('.')}." for clause in more)
    yield "No later run uses it."
    if drop.role == "train" and drop.id in past.champion:
        yield f"The model that serves was trained on it, since run {past.first[drop.id].run_id}."
    if drop.state == DropState.SUSPENDED:
        yield "If rows of it are wrong, mend them and drop the file again: that is a new drop."
    yield f"To bring it back as it is: dropforge drops restore {drop.id} --reason TEXT."
