"""
Words for what rows store: a run's verdict, a change of champion, why a drop is not used.

Everybody who tells it, in a message, a note, a list or a page, joins these clauses, and nobody takes a sentence apart.
For a damaged column there is a clause that says so.
"""

from typing import Any, TypeVar

from daemon.state.states import AWAITING, OVERTAKEN, PromotionKind
from pipeline.artifacts import Frozen, Preview, TrialScores, Verdict
from pipeline.decide.explain import clauses
from pipeline.decide.policy import WATCH_RETURN, is_far_below
from pipeline.decide.watch import Watch
from pipeline.report.next_steps import ways_out
from pipeline.words import count, listed

_Fact = TypeVar("_Fact", bound=Frozen)
#: The words for the outcome of a win that was not promoted.
_WORDS = {
    AWAITING: "won, waits for approval (dropforge promote {run})",
    OVERTAKEN: "won, but another champion came first, with which it was not compared",
}


class Suspension(Frozen):
    """What the trial of a suspended drop found."""

    blamed_run: int
    """The run that put the drop under suspicion."""
    trial: int
    tested: tuple[int, ...]
    """The drops that the trial tried, this one included, on top of the champion's."""
    control: int
    scores: TrialScores


def drop_clauses(drop: Any) -> list[str]:
    """
    Return why a drop is proposed, rejected, withdrawn or suspended, a clause each; none without a reason in its row.

    Of a suspended drop the first clause is the reason, the others are the evidence and the ways out.
    """
    if drop.suspension is None:
        return [drop.reason] if drop.reason else []
    suspension = _read(Suspension, drop.suspension)
    if suspension is None:
        return ["what its trial found cannot be read"]
    scores, alone = suspension.scores, len(suspension.tested) == 1
    tried = "it alone" if alone else f"drops {listed(list(map(str, suspension.tested)))} together"
    return [
        f"run {suspension.blamed_run} was worse with it, and so was run {suspension.trial}, which tried {tried}",
        *([] if alone else [f"without drop {drop.id} no harm was found"]),
        (
            f"the control, run {suspension.control}, was better on {scores.losses:,} and worse on {scores.wins:,} of "
            f"{count(scores.groups, 'group of records', 'groups of records')}: dropforge report {suspension.trial}"
        ),
        *(way.line for way in ways_out(drop.id, scores.lost_drops, drop.track)),
    ]


def preview_clauses(drop: Any) -> list[str]:
    """
    Return how well the champion's answers agree with a drop, and a warning if that is far below its usual score.

    Empty without a preview, or if that failed or is damaged. `drop` is its row.
    """
    preview = None if drop.preview is None else _read(Preview, drop.preview)
    if preview is None or preview.points is None:
        return []
    asked = f"{count(preview.records, 'new record')} ({preview.metric.replace('_', ' ')})"
    words = [f"agreement {preview.points:.1f} points: the champion's answers to {asked}"]
    if is_far_below(preview):
        words.append(f"far below its {preview.usual:.1f} on held-out records: a new kind of task, or wrong answers")
    return words


def watch_clauses(track: str, watch: Watch) -> list[str]:
    """Return the evidence against a track's champion, and what to do, a clause each; none below the limits."""
    command = f"to let it serve again: dropforge rollback --track {track} --to {watch.former} --reason '{watch.words}'"
    do = command if watch.reached == WATCH_RETURN else f"a return is proposed at evidence {WATCH_RETURN}"
    return [f"{watch.words}: evidence {watch.evidence:,.0f}", do] if watch.reached else []


def forcing(run_id: int) -> str:
    """Return the text of the command that makes a run's model the champion whatever its verdict, with --force."""
    return f"dropforge promote {run_id} --force --reason TEXT"


def verdict_clauses(run: Any, against: str | None = None) -> list[str]:
    """
    Return the clauses of a run's verdict, by the run's row, as `pipeline.decide.explain` does; none without a verdict.

    Of a win that was not promoted the first says why: it waits for approval, or another champion came first, or
    `against` (from `blocker`), if given.
    """
    if run.verdict is None:
        return []
    head, *rest = _words_of(run.verdict)
    if run.outcome in _WORDS:
        head = _WORDS[run.outcome].format(run=run.id)
    if against is not None:
        head = f"won, but {against} ({forcing(run.id)} takes it all the same)"
    return [head, *rest]


def change_clauses(change: Any) -> list[str]:
    """Return why, and by whom, the champion changed, a clause each; `change` is the promotion's row."""
    by = f" by {change.approved_by}" if change.approved_by else ""
    if change.kind == PromotionKind.BASE:
        return ["another base model in the settings" if change.generation else "base model"]
    if change.kind == PromotionKind.ROLLBACK:
        return [f"rolled back to generation {change.restored}{by}", change.reason]
    if change.kind == PromotionKind.FORCED:
        return [f"forced{by} over {change.overrode}", change.reason]
    return [*_words_of(change.verdict), *filter(None, [by and f"approved{by}", change.reason])]


def _words_of(verdict: object) -> list[str]:
    known = _read(Verdict, verdict)
    return ["its verdict cannot be read"] if known is None else clauses(known)


def _read(kind: type[_Fact], value: object) -> _Fact | None:
    """Return what a column stores, or `None` if that is damaged: the other rows are shown all the same."""
    try:
        return kind.model_validate(value)
    except ValueError:
        return None
