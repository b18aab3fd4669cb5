"""Confirmation sentences for a person's actions, common to the terminal and the web page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daemon.inbox.answers.remarks import use_of_pinned
from daemon.settings.model import Settings
from daemon.state.states import RunState, state_words
from daemon.system.clock import now_ms, utc
from daemon.views.drops import last_prepared
from daemon.views.overview import Overview
from pipeline.words import count, short

if TYPE_CHECKING:
    from daemon.queue.drops import Withdrawal
    from daemon.state.tables import Drop, Promotion
    from daemon.views.attention import Attention


def cancelled(run: int, state: str) -> str:
    """Return the confirmation that run `run` was cancelled or, if `state` is "running", will stop."""
    return f"run {run} {'is asked to stop' if state == RunState.RUNNING else state_words(state)}"


def moved(order: Sequence[int]) -> str:
    """Return the new order of the queue as a sentence; `order` has the ids of its runs."""
    return f"the order is now: {', '.join(f'run {number}' for number in order)}"


def paused(track: str) -> str:
    """Return the confirmation that a track is paused, with the command that resumes it."""
    return f"track {track} is paused: no run of it begins; to resume: dropforge resume {track}"


def resumed(track: str) -> str:
    """Return the confirmation that a track is resumed."""
    return f"track {track} is resumed: its runs begin in their order"


def dismissed(entry: "Attention") -> str:
    """Return the confirmation that an entry is dismissed, and whether for a day or until it happens again."""
    return f"dismissed {'for a day' if entry.since is None else 'until it happens again'}: {entry.title}"


def promoted(row: "Promotion") -> list[str]:
    """Return lines on a manual promotion: the model that serves now, and the verdict that was overridden, if any."""
    serves = f"track {row.track} serves model {short(row.model_id)} of run {row.run_id}"
    over = [] if row.overrode is None else [f"the verdict that this overrides: {row.overrode}"]
    return [f"{serves}, as generation {row.generation}", *over]


def rolled_back(row: "Promotion") -> list[str]:
    """Return lines on a rollback: the model that serves again, the model that is blocked, and the links."""
    return [
        f"track {row.track} serves model {short(row.model_id)} again, as generation {row.generation}",
        f"model {short(row.previous_model_id or '')} is blocked: no run promotes it again",
        "the link previous leads to it, and champion to the model that serves",
    ]


def accepted(overview: Overview, settings: Settings, row: "Drop") -> list[str]:
    """Return lines on an accepted held-out drop: its use, and the track's queued runs with when they begin."""
    use = use_of_pinned(settings, row.track)
    return [f"drop {row.id} ({row.name}) is accepted: {use}", *_queued(overview, settings, row.track)]


def accepted_answers(overview: Overview, settings: Settings, row: "Drop") -> list[str]:
    """Return lines on accepted answers: when they count, and the track's queued runs with when they begin."""
    words = f"drop {row.id} ({row.name}): its new answers to old questions count from the next run on"
    return [words, *_queued(overview, settings, row.track)]


def restored(overview: Overview, settings: Settings, row: "Drop") -> list[str]:
    """Return lines on a restored drop: the next run uses it, its accepted answers count again, and queued runs."""
    again = f"drop {row.id} ({row.name}) is accepted again: the next run of track {row.track} uses it"
    answers = ["its answers to old questions count again, as they were accepted"] if row.answers_accepted else []
    return [again, *answers, *_queued(overview, settings, row.track)]


def withdrawn(overview: Overview, done: "Withdrawal") -> list[str]:
    """
    Return lines on a withdrawal: cancelled and queued runs, and other drops' answers that may count in its place now.

    If the champion was trained on the drop, a line has the command that rolls it back, or why none can. If the
    drop was held-out and a run is queued, a line says to drop a corrected file before it begins.
    """
    lines, track, uses = list(done.words), done.drop.track, overview.uses(done.drop.id or 0)
    last = overview.read(lambda reader: [last_prepared(reader, overview.folder, track)])
    asked = {drop.id for drop in overview.drops_with_new_answers(1000)}
    lines += [
        f"{count(pair.rows, 'record')} of drop {pair.new} with other answers to its questions may count now, unaccepted"
        f"; if they are wrong: dropforge drops withdraw {pair.new} --reason TEXT"
        for _, data in last
        if data is not None
        for pair in data.proposals
        if pair.old == done.drop.id and pair.new in asked
    ]
    if uses.champion is not None:
        see = f"dropforge history --track {track}"
        back = f"dropforge rollback --track {track} --to {uses.before} --reason TEXT"
        way = f"to let the latest one without withdrawn drops serve: {back}"
        if uses.before is None:
            way = f"every former one has withdrawn drops, lost its place by a rollback or is gone: {see}"
        lines.append(f"the champion of track {track}, generation {uses.champion}, was trained on it; {way}")
    if done.queued is not None and done.drop.role == "heldout":
        lines.append(
            "if a corrected file is to take its place, drop it before that run begins: it judges with what is there"
        )
    return lines


def _queued(overview: Overview, settings: Settings, track: str) -> list[str]:
    """Return a line per queued run of the track with when it begins; empty for a track not in the settings."""
    if track not in settings.track_names:
        return []
    quiet = f"it begins after {settings.track(track).run_after_quiet_seconds:g} s without another drop"
    return [
        f"run {run.id} is queued: {run.paused or ('it begins next' if run.not_before <= utc(now_ms()) else quiet)}"
        for run in overview.runs(track, [RunState.QUEUED])
    ]
