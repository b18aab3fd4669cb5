"""
What became of a drop, in sentences for whoever dropped it.

The text follows from the database alone and changes only when something became of the drop: who keeps it in a file
compares it with the file.
"""

from collections.abc import Iterator

from sqlalchemy import text
from sqlmodel import Session, col, select

from daemon.inbox.answers.receipts import iso_time
from daemon.inbox.answers.remarks import begins_when, loss_words, unlikely_words, use_of_pinned
from daemon.queue.snapshots import snapshot_ids
from daemon.settings.model import Settings
from daemon.state.questions import CHAMPIONS, GAVE_BACK, LOSS
from daemon.state.states import AWAITING, OVERTAKEN, DropState, PromotionKind, RunState
from daemon.state.tables import Drop, Event, Promotion, Run, Suspect, Track, rows_of
from pipeline.words import count, printable

_WON, _TOO_LITTLE = "promoted: ", "insufficient evidence: "
_AGAIN = "It is trained on again, together with the next drops."


class TrackPast:
    """What came of a track's runs, read once for many drops; it holds until the database changes."""

    def __init__(self, session: Session, track: str) -> None:
        """Read the champions of `track`; runs are read when asked for."""
        self._track = track
        self._held: dict[int, frozenset[int]] = {}
        promotions = rows_of(session, Promotion, CHAMPIONS, track=track).all()
        #: The change by which a champion first was one that had been trained on a drop.
        self.first: dict[int, Promotion] = {}
        serving = session.get(Track, track)
        #: The drops in the snapshot that the champion was made from.
        self.champion: frozenset[int] = frozenset()
        for one in promotions:
            for drop in one.drops or ():
                self.first.setdefault(drop, one)
            if one.drops is not None and serving is not None and one.model_id == serving.champion_model_id:
                self.champion = frozenset(one.drops)
        #: The change that made today's champion.
        self.latest = promotions[-1] if promotions else None

    def last_run(self, session: Session, drop: Drop) -> Run | None:
        """Return the latest run that held a drop since it last came in; one without a verdict has given it back."""
        if drop.first_run is None:
            gave_back = session.scalars(text(GAVE_BACK), {"track": self._track, "drop": drop.id}).first()
            return None if gave_back is None else session.get_one(Run, gave_back)
        runs = select(Run.id).where(Run.track == self._track, col(Run.id) >= drop.first_run)
        for number in session.exec(runs.order_by(col(Run.id).desc())):
            if number is not None and number not in self._held:
                self._held[number] = snapshot_ids(session.get_one(Run, number))
            if number is not None and drop.id in self._held[number]:
                return session.get_one(Run, number)
        return None


def tell(session: Session, settings: Settings, drop: Drop, past: TrackPast) -> str:
    """Return the text about a drop that is accepted, proposed, withdrawn or suspended; `past` is its track's."""
    head = f"{drop.name}: drop {drop.id} of track {drop.track}, {count(drop.rows, 'row')}"
    # Reasons and labels come from people and from data; a terminal may be what shows them.
    sentences = "\n".join(map(printable, _sentences(session, settings, drop, past)))
    return f"{head}, received {iso_time(drop.received_at)}\n\n{sentences}\n"


def _sentences(session: Session, settings: Settings, drop: Drop, past: TrackPast) -> Iterator[str]:
    """Yield the sentences: the first says what became of the drop."""
    if drop.state == DropState.PROPOSED:
        yield f"It waits for a person, who lets it count or not: dropforge drops accept {drop.id}."
        yield f"Why: {drop.reason}."
    elif drop.state == DropState.ACCEPTED and drop.role == "heldout":
        yield f"Accepted: {use_of_pinned(settings, drop.track)}."
    elif drop.state == DropState.ACCEPTED:
        suspect = _latest_suspect(session, drop)
        if suspect is not None and suspect.ended is None:
            yield from _on_trial(suspect)
        elif drop.id in past.champion:
            yield from _serves(past.first[drop.id])
        else:
            yield from _not_serving(session, settings, drop, past)
            yield from _cleared(session, suspect)
    else:
        yield from _taken_out(drop, past)
    yield from _loss(session, drop, past)


def _on_trial(suspect: Suspect) -> Iterator[str]:
    turn = "It is tried alone when nothing else is to be run"
    if suspect.trial_run is not None:
        turn = f"Run {suspect.trial_run} tries it alone"
    yield f"On trial: run {suspect.blamed_run} was worse, and this drop may be the reason."
    yield f"{turn}, beside what the model that serves was trained on; until then no other run uses it."
    yield "If that is worse too, the drop is suspended; if not, it is used as before. Nothing needs to be done."


def _serves(first: Promotion) -> Iterator[str]:
    yield "In use: the model that serves was trained on it."
    yield _how_it_came(first)


def _how_it_came(first: Promotion) -> str:
    """Say by which run a drop first came into a champion, and how much better that was."""
    if first.kind == PromotionKind.FORCED:
        by = f" by {first.approved_by}" if first.approved_by else ""
        return f"Run {first.run_id} was trained on it, and its model was made the champion{by}: {first.reason}."
    gain = first.reason.removeprefix(_WON)
    return f"Run {first.run_id} was trained on it, and its model was promoted: {gain}."


def _not_serving(session: Session, settings: Settings, drop: Drop, past: TrackPast) -> Iterator[str]:
    """Yield what the latest run came to that held an accepted drop which the champion does not know."""
    run, first = past.last_run(session, drop), past.first.get(drop.id or 0)
    if first is not None and run is not None and run.id == first.run_id:
        yield "Not in use any more: the model that serves was not trained on it."
        yield _how_it_came(first)
        if past.latest is not None and past.latest.kind == PromotionKind.ROLLBACK:
            yield f"Since then the track was {past.latest.reason}."
        yield _AGAIN
    elif run is None:
        yield f"Accepted: it waits for the next run of track {drop.track}, which {begins_when(settings, drop.track)}."
    else:
        yield from _after_run(run)


def _after_run(run: Run) -> Iterator[str]:
    said = (run.sentence or "").removeprefix(_WON)
    if run.state in {RunState.RUNNING, RunState.WAITING}:
        yield f"In run {run.id}, which is under way: what comes of it will stand here."
    elif run.state in {RunState.FAILED, RunState.CRASHED}:
        yield f"No verdict yet: run {run.id}, which held it, {run.state}: {run.error}."
        yield f"Whoever runs Dropforge can let it go on: dropforge retry {run.id}. {_AGAIN}"
    elif run.state == RunState.CANCELLED:
        yield f"No verdict yet: run {run.id}, which held it, was cancelled. {_AGAIN}"
    elif run.outcome == AWAITING:
        yield f"It won: run {run.id} was trained on it and is better: {said}."
        yield f"Its model serves once a person lets it: dropforge promote {run.id}."
    elif run.outcome == OVERTAKEN:
        yield f"Not in use: run {run.id} was trained on it and won ({said}), but another model came first."
        yield _AGAIN
    elif run.outcome == "insufficient_evidence":
        yield f"Not in use yet: run {run.id}, which held it, had too little data: {said.removeprefix(_TOO_LITTLE)}."
        yield "The next run holds it, together with the next drops."
    else:
        yield f"Not in use: run {run.id} held it, and its model was not promoted: {said}."
        yield f"{_AGAIN} Why it was not, and what to do: dropforge report {run.id}."


def _cleared(session: Session, suspect: Suspect | None) -> Iterator[str]:
    """Yield how a drop's being on trial has ended."""
    if suspect is None or suspect.trial_run is None:
        return
    ended = select(Event).where(Event.drop_id == suspect.drop_id, Event.kind == "suspicion_ended")
    last = session.exec(ended.order_by(col(Event.id).desc())).first()
    if last is not None:
        yield f"It was on trial since run {suspect.blamed_run} was worse, and was cleared: {last.detail['reason']}."


def _taken_out(drop: Drop, past: TrackPast) -> Iterator[str]:
    """Yield why a withdrawn or suspended drop is out, what it is still in, and how it comes back."""
    why = f": {drop.reason}" if drop.reason else ""
    yield f"{drop.state.capitalize()}{why}."
    yield "No later run uses it."
    if drop.role == "train" and drop.id in past.champion:
        yield f"The model that serves was trained on it, since run {past.first[drop.id].run_id}."
    if drop.state == DropState.SUSPENDED:
        yield "If rows of it are wrong, mend them and drop the file again: that is a new drop."
    yield f"To bring it back as it is: dropforge drops restore {drop.id} --reason TEXT."


def _loss(session: Session, drop: Drop, past: TrackPast) -> Iterator[str]:
    """Yield the loss on a drop of the latest champion that did not know it; what serves needs no look any more."""
    found = rows_of(session, Event, LOSS, drop=drop.id).first()
    if found is not None and found.detail["stands_out"] and drop.id not in past.champion:
        yield _as_sentence(unlikely_words(found.detail, found.run_id))
    elif found is not None:
        yield f"In run {found.run_id} the champion's loss on its answers was {loss_words(found.detail)}."


def _latest_suspect(session: Session, drop: Drop) -> Suspect | None:
    return session.exec(select(Suspect).where(Suspect.drop_id == drop.id).order_by(col(Suspect.id).desc())).first()


def _as_sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
