"""Word a verdict in clauses, its reason codes and the results of its guards (`pipeline.decide.policy.GUARDS`)."""

from collections.abc import Mapping, Sequence

from pipeline.artifacts import GuardResult, Verdict
from pipeline.decide.policy import GUARDS, is_shown, label
from pipeline.words import count, listed, plain, signed, span

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
_INSTEAD = {"label": "a label of the training data", "empty": "nothing", "short": "far fewer words than the base model"}


#: Of a control, by whether its `Settlement` passed; its trial may be worse than the control all the same.
SETTLED = {
    True: "with it, guards of old drops pass its trial",
    False: "with it, guards of old drops stop its trial, too",
}


def brief(verdict: Verdict) -> dict[str, object]:
    """
    Return a verdict as JSON for its run's row: without defaults, slices and the guards that `clauses` does not name.

    `slices_not_listed` then counts those of `unguarded`, too.
    """
    named = tuple(guard for guard in verdict.guards if guard.state == "failed" or guard.guard == "collapse")
    few = len(unguarded(verdict)) + verdict.slices_not_listed
    settled = verdict.settlement and verdict.settlement.model_copy(update={"guards": ()})
    short = verdict.model_copy(update={"guards": named, "settlement": settled, "slices": (), "slices_not_listed": few})
    return short.model_dump(mode="json", exclude_defaults=True)


def sentence(clauses: Sequence[str]) -> str:
    """Join a verdict's clauses in one line, as `promoted: +11.5 points (+5.9 to +16.9); REMARK`; "" for none."""
    return ": ".join(filter(None, (*clauses[:1], "; ".join(clauses[1:]))))


def clauses(verdict: Verdict) -> list[str]:
    """
    Return the outcome of a verdict, or of its `brief`, what was measured, and remarks, a clause each.

    The outcome names the first guard that failed; measured are gain and interval, as `+11.5 points (+5.9 to +16.9)`, or
    the records that a verdict lacks, without remarks. The remarks are on a control's settlement, small drops, collapsed
    answers, and a watch that cannot be compared.
    """
    words = verdict.outcome.replace("_", " ")
    if verdict.outcome == "insufficient_evidence":
        if "no_pinned_heldout" in verdict.reasons:
            return [words, "no held-out set was dropped"]
        have = count(verdict.records, "held-out record")
        if verdict.groups != verdict.records:
            have = f"{count(verdict.groups, 'different held-out record')} ({verdict.records:,} in all)"
        rows = verdict.rows_needed
        bring = "" if rows is None else f", which about {count(rows, 'more row brings', 'more rows bring')}"
        return [words, f"{have}, and a verdict needs {verdict.groups_needed or 0:,}{bring}"]
    failed = [f"{label(guard)} {change_words(guard)}".rstrip() for guard in verdict.guards if guard.state == "failed"]
    gain = f"{signed(verdict.gain or 0.0)} points"
    if verdict.outcome == "guard_failed" and failed:
        words += f" ({failed[0]}{f', and {len(failed) - 1} more' if failed[1:] else ''})"
        gain += " on the task"
    if verdict.settled_by is not None:
        words += f" after its control, run {verdict.settled_by}"
    settled = [] if verdict.settlement is None else [SETTLED[verdict.settlement.passed]]
    between = f" ({span(verdict.interval)})" if verdict.interval else ""
    few = len(unguarded(verdict)) + verdict.slices_not_listed
    small = [f"not guarded: {count(few, 'small drop or tag', 'small drops or tags')}"] if few else []
    watch = f"generation {verdict.unwatched}, on watch, cannot be compared: it is damaged, or prompted in another way"
    stuck = [watch] * (verdict.unwatched is not None)
    return [words, f"{gain}{between}", *settled, *small, *collapse_words(verdict), *stuck]


def unguarded(verdict: Verdict) -> list[str]:
    """Return the labels of the listed drops and tags that have too few records to be guarded."""
    return [label(guard) for guard in verdict.guards if guard.guard == "slice" and guard.p_value is None]


def collapse_words(verdict: Verdict) -> list[str]:
    """Return a text per suite of free questions whose `collapse` guard shows harm, even if it is only displayed."""
    texts = []
    for guard in verdict.guards:
        if guard.guard == "collapse" and is_shown(guard):
            parts = {_INSTEAD[kind]: f"{number:g}" for kind, number in guard.parts.items() if number}
            instead = listed([f"{words} ({number})" if len(parts) > 1 else words for words, number in parts.items()])
            texts.append(f"answers {guard.candidate:g} of {guard.records} general questions with {instead}")
    return texts


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

    A guard with `words` in `GUARDS` has these after its label instead.
    """
    words, pattern = label(guard), GUARDS[guard.guard].words
    if pattern:
        scores = "scored on none of these records" if guard.candidate is None else pattern.format_map(dict(guard))
        return f"{words}: {scores}"
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
