"""A verdict in plain English: what was found, what stands against promotion, and what a person can do about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.artifacts import GuardResult, Outcome, Verdict
from pipeline.config import GateConfig
from pipeline.gate import statistics
from pipeline.gate.power import LOWER_POWERS, POWER
from pipeline.gate.reasons import REASONS
from pipeline.metrics.registry import METRICS
from pipeline.wording import cases

WORDS: dict[Outcome, str] = {
    "promoted": "promoted",
    "worse": "worse",
    "not_shown_better": "not shown better",
    "insufficient_evidence": "insufficient evidence",
    "guard_failed": "guard failed",
    "contaminated": "contaminated",
}

_REMEDIES: Mapping[str, str] = {
    "metric": "look at its worst answers in the report; guards.metrics is the margin",
    "slice": "drop more rows of that kind, or withdraw the drop that spoils it; guards.slices is the margin",
    "nll": "train less or on cleaner answers (train.epochs, train.learning_rate); guards.nll is the margin",
    "general": "train less (train.epochs, train.learning_rate) or add general rows; guards.general is the margin",
    "general_base": "dropforge rollback{track} --reason TEXT goes back a champion, general rows bring back what was "
    "lost; guards.general_base is the margin",
    "empty": "look for empty answers in the new drops; guards.degenerate is the margin",
    "truncated": "look for long answers in the new drops, or raise evaluate.max_new_tokens",
    "looping": "train less or set evaluate.repetition_penalty; guards.degenerate is the margin",
    "catastrophe": "look at the worst regressions in the report",
    "floor": "drop more rows, lower the floor in guards.floors, or take out one that nothing can be scored by",
    "former": "dropforge rollback{track} --reason TEXT goes back a champion; guards.former is the margin",
    "latency": "look for longer answers in the new drops; guards.latency is the margin",
    "size": "guards.size is the margin",
    "judge": "look at the judged pairs in the report",
}  # fmt: skip


#: Kinds of guards as a sentence names them; the others are those of slices.
_FAMILIES: Mapping[str, str] = {
    "metric": "those on other metrics", "general": "those on general suites", "nll": "the one on likelihood",
    "general_base": "those against the base model",
    "empty": "the one on empty answers", "truncated": "the one on answers cut off",
    "looping": "the one on looping answers", "catastrophe": "the one on answers that lost half of the scale",
    "former": "the one on former champions",
}  # fmt: skip


_MOST_DIGITS = 12
#: What four decimals can show.
_LEAST_P = 0.0001


@dataclass(frozen=True)
class VerdictContext:
    """What a sentence says beside the verdict's own numbers."""

    track_option: str
    """That names the track to a command; empty for the default one."""
    gate: GateConfig
    least_records: int
    harm_p_value: float
    costliest_guards: str | None = None
    """The family of guards that would stop the most good candidates by chance."""
    seen_lost: tuple[str, ...] = ()
    seen_by_candidate: int = 0
    seen_by_champion: int = 0
    repinned: tuple[tuple[int, str, int], ...] = ()
    """Pinned drops that changed references since the champion was judged: number, file, records."""
    held_excused: bool = False
    """Whether a bad verdict does not stand without these records, so that no drop is suspended."""


def sentence(verdict: Verdict, facts: VerdictContext) -> str:
    """Return the verdict in one sentence with its numbers, and a second one on what this set can show."""
    head = f"{WORDS[verdict.outcome]}: "
    title = METRICS[verdict.metric].title
    if verdict.candidate_score is None or verdict.champion_score is None or verdict.interval is None:
        found = f"{head}no held-out records to judge on, and a verdict by {title} needs {facts.least_records}"
    else:
        low, high = verdict.interval
        found = head + (
            f"{title} {tenths(verdict.candidate_score)} against the champion's {tenths(verdict.champion_score)} "
            f"on {records(verdict.records)} (gain {tenths(verdict.gain)} points, "
            f"{statistics.CONFIDENCE:.0%} interval {tenths(low)} to {tenths(high)}, {p(verdict.p_value)}; "
            f"{verdict.wins} better, {verdict.losses} worse, {verdict.ties} equal)"
        ).replace("%", " %")
    why = "; ".join(part for part in (_yardstick(facts), _why(verdict, facts)) if part)
    return f"{found}: {why}. {_context(verdict, facts)}" if why else f"{found}. {_context(verdict, facts)}"


def p(value: float | None) -> str:
    """Return a p-value as a sentence says it."""
    if value is None:
        return "untested"
    if value < _LEAST_P:
        return "p < 0.0001"
    return f"p = {value:.4f}" if value < 0.1 else f"p = {value:.2f}"  # noqa: PLR2004 - further digits say nothing


def _p_beside(value: float | None, limit: float) -> str:
    """Return a p-value as a sentence says it beside a limit that it is not."""
    said = p(value)
    if value is None or value < _LEAST_P:
        return said
    return f"p = {_beside(value, limit, len(said.partition('.')[2]))}"


def _beside(value: float, limit: float, digits: int) -> str:
    """Return a number with the digits that tell it from a limit that it is not: 0.996 is below 1, and 1.00 is not."""
    while value != limit and round(value, digits) == round(limit, digits) and digits < _MOST_DIGITS:
        digits += 1
    return f"{value:.{digits}f}"


def tenths(value: float | None) -> str:
    """Return points as a sentence says them, without a negative zero."""
    return f"{round(value or 0.0, 1) + 0.0:.1f}"


def records(count: int, kind: str = "held-out record") -> str:
    """Return a count of records as a sentence says it."""
    return f"{count} {kind}{'' if count == 1 else 's'}"


def guard_words(row: GuardResult) -> str:
    """Say what a guard found, with its number and its margin."""
    words = _GUARD_WORDS.get(row.guard, _points)(row)
    proof = f", {p(row.p_value)}" if row.p_value is not None else ""
    return f"{words}{proof})"


def _points(row: GuardResult) -> str:
    lost = f"{row.label} lost {tenths(-(row.change or 0))} points on {records(row.records or 0, 'record')}"
    return f"{lost} ({tenths(row.candidate)} against {tenths(row.champion)}, margin {row.margin:g}"


def _former(row: GuardResult) -> str:
    lost = f"the {row.label} is {tenths(-(row.change or 0))} points better on {records(row.records or 0, 'record')}"
    return f"{lost} ({tenths(row.champion)} against {tenths(row.candidate)}, margin {row.margin:g}"


def _nll(row: GuardResult) -> str:
    if row.candidate is None or row.change is None:
        return "the candidate's likelihood of the references is not a finite number (it has to be one"
    return f"the {row.label} rose by {row.change:.3f} nats a token (margin {row.margin:g}"


def _rate(row: GuardResult) -> str:
    return f"{row.label} rose from {tenths(row.champion)} to {tenths(row.candidate)} per cent (margin {row.margin:g}"


def _catastrophe(row: GuardResult) -> str:
    return f"{row.candidate:g} answers lost 50 points or more and {row.champion:g} gained as much (a sign test"


def _floor(row: GuardResult) -> str:
    if row.candidate is None:
        return f"{row.label}, could be scored on none of these records (guards.floors"
    return f"{row.label}, is {tenths(row.candidate)} (guards.floors"


def _cost(row: GuardResult) -> str:
    return f"{row.label}: {row.candidate:.3g} against {row.champion:.3g}, {row.change:.1f} times (margin {row.margin:g}"


def _judge(row: GuardResult) -> str:
    return f"{row.label}: {row.candidate:g} of the candidate and {row.champion:g} of the champion (a sign test"


_GUARD_WORDS: Mapping[str, Callable[[GuardResult], str]] = {
    "former": _former, "nll": _nll, "empty": _rate, "truncated": _rate, "looping": _rate, "catastrophe": _catastrophe,
    "floor": _floor, "latency": _cost, "size": _cost, "judge": _judge,
}  # fmt: skip


def _why(verdict: Verdict, facts: VerdictContext) -> str:
    """Say what stood against promotion, the decisive first; of a promoted one, what it rests on."""
    said = _said(verdict, facts)
    failed = [row for row in verdict.guards if row.state == "failed"]
    guards = [guard_words(row) for row in failed]
    # A slice that lost and is a guard says so itself.
    told = {"seen_lost"} if any(row.guard == "slice" for row in failed) else set()
    tested = [said[code] for code in verdict.reasons if code in said and code not in told]
    if verdict.outcome == "worse":
        drops = "" if facts.held_excused else " and at the drops that were new"
        return f"{said['harm_shown']}; look at the worst regressions in the report{drops}"
    if verdict.outcome == "contaminated":
        return said["trained_on_heldout"]
    parts = guards + tested if verdict.outcome == "guard_failed" else tested + guards
    if verdict.outcome == "guard_failed" and failed and not facts.held_excused:
        parts.append(_REMEDIES[failed[0].guard].format(track=facts.track_option))
    if verdict.outcome == "not_shown_better" and verdict.records_needed:
        parts.append(f"about {verdict.records_needed} more held-out records would show this gain if it is real")
    return "; ".join(parts)


def _yardstick(facts: VerdictContext) -> str:
    """Say that both models were measured by other references than the champion was when it won."""
    if not facts.repinned:
        return ""
    replaced = " and ".join(f"{count} by {name} (drop {drop})" for drop, name, count in facts.repinned)
    found = f"pinned references were replaced since the champion was judged, {replaced}"
    if not facts.held_excused:
        return found
    back = " and ".join(f"dropforge drops withdraw {drop} --reason TEXT" for drop, _, _ in facts.repinned)
    return f"{found}, and without them this would not be shown: look at them first ({back}); no drop is suspended"


def _said(verdict: Verdict, facts: VerdictContext) -> dict[str, str]:
    """Return the words of the reasons that are no guard's."""
    gate, least = facts.gate, facts.least_records
    pinned = "drop rows into the track's heldout folder, or set gate.on"
    return {
        "trained_on_heldout": f"the candidate was trained on {records(facts.seen_by_candidate)} of these; "
        "the next run is prepared and trained anew; drop a file to begin one",
        "no_pinned_heldout": f'gate.on is "pinned" and no held-out set was dropped; {pinned}',
        "too_few_seen": f'gate.on is "seen" and a verdict needs {least} held-out records of drops that '
        f'the champion was trained on; drop more rows of their kind, or set gate.on = "all"',
        "too_few_records": f"a verdict needs {records(least)}; drop more rows",
        "harm_shown": f"a loss like this by chance has {p(facts.harm_p_value)}",
        "p_above_limit": f"{_p_beside(verdict.p_value, gate.alpha)} is above {gate.alpha:g}",
        "gain_below_minimum": f"a gain of {_beside(verdict.gain or 0.0, gate.min_gain, 2)} is below {gate.min_gain:g}",
        "gain_from_new_data": f"{REASONS['gain_from_new_data']}, {_with_and_without(verdict)}",
        "seen_lost": f"the gain is there only with new records, and {_listed(facts.seen_lost)} lost",
    }


def _with_and_without(verdict: Verdict) -> str:
    gains = {row.kind: row for row in verdict.slices}
    new, known = gains.get("unseen"), gains.get("seen")
    on_new = f"{new.gain:+.1f} points on {new.records} of them" if new else "none of them old"
    return f"{on_new} and {known.gain:+.1f} on the {known.records} others" if known else on_new


def _context(verdict: Verdict, facts: VerdictContext) -> str:
    """Say what this set can show at all, how often it was used, and what it leaves out."""
    sees = f"{_sees(verdict, facts.costliest_guards)}; "
    if verdict.outcome == "insufficient_evidence":
        # No gain would be promoted on it, and the sentence has said what is missing.
        sees = ""
    if verdict.outcome == "promoted" and (verdict.detectable_power or 0) < POWER:
        # Beside a win this would only confuse: so large a change blurs every guard that the power is computed with.
        sees = ""
    one = verdict.uses == 1
    uses = f"{verdict.uses} candidate{'' if one else 's'} of this track {'was' if one else 'were'} judged before"
    same = f", {verdict.same_set_uses} of them on these records" if verdict.uses else ""
    left = facts.seen_by_champion
    out = f"that the champion at the time was trained on, or on near copies of, {'is' if left == 1 else 'are'} left out"
    seen = f"; {records(left)} {out}" if left else ""
    return f"{sees}{uses}{same}{seen}."


def _sees(verdict: Verdict, costliest: str | None) -> str:
    """Say the smallest gain that this set can show, and what stands in its way."""
    smallest = verdict.smallest_detectable_gain
    if smallest is None:
        return f"On this set no gain, however large, would be promoted in {cases(LOWER_POWERS[-1])}"
    found = f"A gain of {smallest:.1f} points would be promoted on this set in {cases(verdict.detectable_power)}"
    if (verdict.detectable_power or POWER) >= POWER:
        return found
    most = f", most of all {_FAMILIES.get(costliest, 'those on slices')}" if costliest else ""
    chance = f"guards that look at few records also stop good candidates by chance{most}"
    return f"{found}, and none much more surely: {chance}"


def _listed(labels: Sequence[str]) -> str:
    return " and ".join(labels)
