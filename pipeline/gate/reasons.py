"""The reason codes of verdicts, each in a few words, and which of them say nothing against the new drops."""

from collections.abc import Iterable, Mapping

#: The reason code of each guard.
GUARD_REASONS: Mapping[str, str] = {
    "metric": "metric_lost",
    "slice": "slice_lost",
    "nll": "nll_rose",
    "general": "general_lost",
    "general_base": "general_below_base",
    "empty": "empty_rose",
    "truncated": "truncated_rose",
    "looping": "looping_rose",
    "catastrophe": "catastrophes",
    "floor": "below_floor",
    "former": "former_better",
    "latency": "slower",
    "size": "larger",
    "judge": "judge_prefers_champion",
}

#: Guards whose failure says nothing against the drops that were new. Without these a candidate is no nearer to a floor
#: or a model that was better once, no faster and no smaller; what was lost since the base model was lost by a line of
#: champions; and a judge's taste is no proof of harm.
NO_FAULT_OF_DROPS = frozenset({"floor", "former", "latency", "size", "judge", "general_base"})

#: Guards that look at what a model does, whatever the references say: no reference makes an answer empty or a loop.
WITHOUT_REFERENCES = frozenset({"general", "empty", "truncated", "looping"})

#: Every reason code, in a few words. `gain_from_new_data` is the only one that a promoted verdict can have.
REASONS: Mapping[str, str] = {
    "trained_on_heldout": "the candidate was trained on records that it was judged on",
    "no_pinned_heldout": "no held-out set was dropped",
    "too_few_seen": "too few held-out records of drops that the champion knows",
    "too_few_records": "too few held-out records",
    "harm_shown": "a loss is shown",
    "nll_not_finite": "the candidate's likelihood of the references is not a number",
    "metric_lost": "another metric lost",
    "slice_lost": "a slice lost",
    "nll_rose": "the references became less likely",
    "general_lost": "general abilities were lost",
    "general_below_base": "general abilities are far below the base model's",
    "empty_rose": "more answers are empty",
    "truncated_rose": "more answers are cut off",
    "looping_rose": "more answers loop",
    "catastrophes": "more answers turned from good to bad than the other way",
    "below_floor": "a score is below its floor, or was not measured",
    "former_better": "a former champion is better",
    "slower": "answers take longer",
    "larger": "the model is larger",
    "judge_prefers_champion": "the judge prefers the champion's answers",
    "p_above_limit": "the gain may be chance",
    "gain_below_minimum": "the gain is too small",
    "gain_from_new_data": "the gain is shown only with the records of new drops",
    "seen_lost": "records of drops that the champion knows lost",
}


def excuse_drops(reasons: Iterable[str]) -> bool:
    """Say whether guards failed, and only such as say nothing against the drops that were new."""
    failed = {*GUARD_REASONS.values(), "nll_not_finite"} & set(reasons)
    return bool(failed) and failed <= {GUARD_REASONS[guard] for guard in NO_FAULT_OF_DROPS}


def blame_drops(outcome: str, reasons: Iterable[str]) -> bool:
    """
    Say whether a verdict speaks against the drops that were new in the candidate.

    One of a contaminated candidate does not: that was not judged.
    """
    return outcome == "worse" or (outcome == "guard_failed" and not excuse_drops(reasons))
