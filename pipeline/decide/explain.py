"""Explain a verdict's reason codes and guards to users, and format a verdict in one line."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.artifacts import GuardResult, Verdict
from pipeline.words import count, listed, plain, signed, span

#: Largest p-value at which a loss counts as harm shown, whatever limit the gate has for a gain.
HARM_P_VALUE = 0.01
#: Rows of general text that are a start against forgetting, as a share of the task's.
GENERAL_SHARE = 0.2


@dataclass(frozen=True)
class Failure:
    """The explanation of a failed guard: reason code, remedy and command."""

    reason: str
    remedy: str = ""
    command: str = ""
    """For the remedy; `{track}` is the option that names the track."""
    found: str = "What it loses"
    """What the guard found; other words where this model may have lost nothing itself."""


GUARDS: Mapping[str, Failure] = {
    "slice": Failure(
        "slice_lost",
        "Drop more rows of that kind, or withdraw the drop that spoils it; guards.slices is the margin.",
    ),
    "general": Failure("general_lost"),  # `pipeline.report.next_steps` has its remedy, with numbers
    "general_base": Failure(
        "general_below_base",
        "Add general rows: they bring back what was lost; guards.general_base is the margin. Or let the champion "
        "before today's serve again, if it lost less.",
        "dropforge rollback{track} --reason TEXT",
        "What was lost since the base model, earlier champions included",
    ),
    "collapse": Failure(
        "collapsed", f"Mix general rows into the training (train.general_rows = {GENERAL_SHARE:g}, or more)."
    ),
    "anchor": Failure(
        "anchor_lost",
        "Drop more rows of that old kind to bring back what was lost; guards.anchor is the margin. Or let the champion "
        "that was better on it serve again.",
        "dropforge rollback{track} --to GENERATION --reason TEXT",
        "What was lost since a former champion, by all since then",
    ),
    "nll": Failure("nll_rose", "Train less (train.epochs, train.learning_rate); guards.nll is the margin."),
    "empty": Failure("empty_rose", "Look for empty answers in the new drops; guards.degenerate is the margin."),
    "truncated": Failure("truncated_rose", "Look for long answers in the new drops, or raise evaluate.max_new_tokens."),
    "looping": Failure(
        "looping_rose", "Train less or set evaluate.repetition_penalty; guards.degenerate is the margin."
    ),
    "floor": Failure(
        "below_floor",
        "Drop more rows that the floor is scored on, lower it, or take it out (guards.floors).",
        found="What is not reached",
    ),
    "judge": Failure(
        "judge_prefers_champion",
        "Read the answers that changed, in the report, and see whether the judge is right.",
        found="What the judge says",
    ),
}

#: Explanations of all other reason codes. A promoted verdict can have `gain_from_new_data` only.
REASONS: Mapping[str, str] = {
    "trained_on_heldout": "The new model was trained on records that it was to be judged on.",
    "no_pinned_heldout": "The gate is to judge on a held-out set of your own, and none was dropped.",
    "too_few_seen": "Too few held-out records of drops that the champion knows.",
    "too_few_records": "There are too few held-out records for a verdict.",
    "harm_shown": "The loss is larger than chance would explain.",
    "nll_not_finite": "The new model's likelihood of the expected answers is not a number: it is broken.",
    "p_above_limit": "The gain could well be chance.",
    "gain_below_minimum": "The gain is smaller than the settings ask for.",
    "gain_from_new_data": "The gain is only there on records of drops that the champion never saw.",
}

#: Descriptions of collapsed answers to general questions, by `pipeline.metrics.degenerate.COLLAPSED`.
_INSTEAD = {
    "label": "a label of the training data",
    "empty": "nothing",
    "short": "far fewer words than the base model",
}


def short_line(verdict: Verdict, needed_records: int, needed_rows: int | None = None) -> str:
    """
    Return the verdict with its gain and interval, as `promoted: +11.5 points (+5.9 to +16.9)`.

    The first failed guard of `guard_failed` and collapsed answers are added. With insufficient evidence it gives the
    number of held-out records that a verdict needs, `needed_records`, and about how many more rows bring them,
    `needed_rows`, unless that is `None`; or it says that no held-out set was dropped.
    """
    words = verdict.outcome.replace("_", " ")
    if verdict.outcome == "insufficient_evidence":
        if "no_pinned_heldout" in verdict.reasons:
            return f"{words}: no held-out set was dropped"
        have = count(verdict.records, "held-out record")
        if verdict.groups != verdict.records:
            have = f"{count(verdict.groups, 'different held-out record')} ({verdict.records:,} in all)"
        bring = "" if needed_rows is None else count(needed_rows, "more row brings", "more rows bring")
        return f"{words}: {have}, and a verdict needs {needed_records:,}{bring and f', which about {bring}'}"
    failed = [f"{guard.label} {change_words(guard)}".rstrip() for guard in verdict.guards if guard.state == "failed"]
    gain = f"{signed(verdict.gain or 0.0)} points"
    if verdict.outcome == "guard_failed" and failed:
        words += f" ({failed[0]}{f', and {len(failed) - 1} more' if failed[1:] else ''})"
        gain += " on the task"
    between = f" ({span(verdict.interval)})" if verdict.interval else ""
    few = len(unguarded(verdict)) + verdict.slices_not_listed
    small = [f"not guarded: {count(few, 'small drop or tag', 'small drops or tags')}"] if few else []
    return "; ".join([f"{words}: {gain}{between}", *small, *collapse_words(verdict)])


def unguarded(verdict: Verdict) -> list[str]:
    """Return the labels of the listed drops and tags that have too few records to be guarded."""
    return [guard.label for guard in verdict.guards if guard.guard == "slice" and guard.p_value is None]


def collapse_words(verdict: Verdict) -> list[str]:
    """Return a text per suite of free questions whose `collapse` guard has p <= `HARM_P_VALUE`, even if only shown."""
    said = []
    for guard in verdict.guards:
        if guard.guard == "collapse" and guard.p_value is not None and guard.p_value <= HARM_P_VALUE:
            parts = {_INSTEAD[kind]: f"{number:g}" for kind, number in guard.parts.items() if number}
            instead = listed([f"{words} ({number})" if len(parts) > 1 else words for words, number in parts.items()])
            said.append(f"answers {guard.candidate:g} of {guard.records} general questions with {instead}")
    return said


def change_words(guard: GuardResult) -> str:
    """Format a guard's change with its sign and unit, as `+0.3 points`; "" if it has none."""
    if guard.change is None:
        return ""
    return f"{signed(guard.change, digits(guard))} {guard.unit}"


def digits(guard: GuardResult) -> int:
    """Return the number of decimals for a guard's values: 3 for nats, 0 for records, else 1."""
    return {"nats": 3, "records": 0}.get(guard.unit, 1)


def guard_words(guard: GuardResult) -> str:
    """
    Return a guard's label, change and limit, as `token F1 +0.3 points (the limit is 2.0 points)`.

    For `floor` the score is in place of change and limit, for `judge` the counts of both models, for `collapse` those
    of candidate and base model.
    """
    words = guard.label
    if guard.guard == "floor":
        # The label has the limit, which is the floor; the change is the distance to it.
        found = "scored on none of these records" if guard.candidate is None else f"{plain(guard.candidate)} points"
        return f"{words}: {found}"
    if guard.guard == "collapse":
        return f"{words}: {guard.candidate:g} of {guard.records}, {guard.champion:g} of the base model's"
    if guard.guard == "judge" and guard.candidate is not None and guard.champion is not None:
        return f"{words}: {guard.candidate:g} of the new model's, {guard.champion:g} of the champion's"
    if guard.change is not None:
        words += f" {change_words(guard)}"
    if guard.margin is not None:
        words += f" (the limit is {margin_words(guard)})"
    return words


def margin_words(guard: GuardResult) -> str:
    """Format a guard's margin with its unit; "" if it has none."""
    if guard.margin is None:
        return ""
    return f"{plain(guard.margin, 2 if guard.unit == 'nats' else 1)} {guard.unit}"
