"""The reason codes of verdicts, each in a few words, and which guards speak against the drops that were new."""

from collections.abc import Mapping

#: The reason code of each guard.
GUARD_REASONS: Mapping[str, str] = {
    "slice": "slice_lost",
    "general": "general_lost",
    "general_base": "general_below_base",
    "anchor": "anchor_lost",
    "nll": "nll_rose",
    "empty": "empty_rose",
    "truncated": "truncated_rose",
    "looping": "looping_rose",
    "floor": "below_floor",
    "judge": "judge_prefers_champion",
    "metric": "metric_lost",
    "former": "former_better",
    "catastrophe": "catastrophes",
    "latency": "slower",
    "size": "larger",
}

#: Guards whose failure puts the drops under suspicion that the champion does not know. The others do not: general
#: abilities, cut off and looping answers come from training too much, and the rest from no data at all.
BLAMING = frozenset({"slice", "nll"})

#: Every reason code, in a few words. `gain_from_new_data` is the only one that a promoted verdict can have.
REASONS: Mapping[str, str] = {
    "trained_on_heldout": "the candidate was trained on records that it was judged on",
    "no_pinned_heldout": "no held-out set was dropped",
    "too_few_seen": "too few held-out records of drops that the champion knows",
    "too_few_records": "too few held-out records",
    "harm_shown": "a loss is shown",
    "nll_not_finite": "the candidate's likelihood of the references is not a number",
    "slice_lost": "a slice lost",
    "general_lost": "general abilities were lost",
    "general_below_base": "general abilities are far below the base model's",
    "anchor_lost": "an old drop is far below what a former champion made of it",
    "nll_rose": "the references became less likely",
    "empty_rose": "more answers are empty",
    "truncated_rose": "more answers are cut off",
    "looping_rose": "more answers loop",
    "below_floor": "a score is below its floor, or was not measured",
    "judge_prefers_champion": "the judge prefers the champion's answers",
    "metric_lost": "another metric lost",
    "former_better": "a former champion is better",
    "catastrophes": "more answers turned from good to bad than the other way",
    "slower": "answers take longer",
    "larger": "the model is larger",
    "p_above_limit": "the gain may be chance",
    "gain_below_minimum": "the gain is too small",
    "gain_from_new_data": "the gain is shown only with the records of new drops",
}
