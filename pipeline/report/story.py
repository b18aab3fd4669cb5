"""Explain a verdict in plain language, without statistics: the decision, its reasons, and the next steps."""

from pipeline.artifacts import Adapter, Dataset, Evaluation, Outcome, Verdict
from pipeline.contract import StepSpec
from pipeline.decide.explain import REASONS, collapse_words, guard_words, unguarded
from pipeline.decide.policy import GENERAL_SHARE, GUARDS, HARM_P_VALUE, LEVEL
from pipeline.report.facts import BlindReview, Story
from pipeline.report.next_steps import may_serve, next_steps
from pipeline.words import count, distinct, first_of, listed, luck, p_words, plain, signed

_HEADLINES: dict[Outcome, str] = {
    "promoted": "The new model is better.",
    "worse": "The new model is worse. The champion stays.",
    "not_shown_better": "The new model was not shown to be better. The champion stays.",
    "insufficient_evidence": "There is too little data to decide. The champion stays.",
    "guard_failed": "A guard blocks the new model. The champion stays.",
    "contaminated": "This result cannot be trusted. The champion stays.",
}
_IN_NF4 = "Both models were evaluated in NF4: their unquantised weights do not fit on the GPU."
_TWO_EACH = "Old drops are judged by the mean of this model and of the run before, trained on the same drops."
_TESTS = {
    "mcnemar": "exact McNemar",
    "t": "paired t and skewness-adjusted t, also with one more record lost completely",
}


def tell(
    verdict: Verdict, dataset: Dataset, evaluation: Evaluation | None, spec: StepSpec, adapter: Adapter | None = None
) -> Story:
    """Return the story of a verdict: headline, explanation and next steps; `spec` is that of the decide step."""
    config = spec.config
    headline = _HEADLINES[verdict.outcome]
    if verdict.outcome == "promoted":
        # Nobody knows yet whether it does: a drop that it was made from may be withdrawn before the run is concluded.
        headline += " It waits for your approval." if config.gate.approval == "manual" else " It wins."
    elif may_serve(verdict):
        headline = "A guard blocks the new model until a control has run."
    why = [
        *_numbers(verdict),
        *([_TWO_EACH] if verdict.pooled else []),
        *([_IN_NF4] if evaluation is not None and evaluation.quantization == "nf4" else []),
        *([f"These have too few held-out records to be guarded: {few}."] if (few := _unguarded(verdict)) else []),
        *_because(verdict, evaluation, spec),
        *_collapsed(verdict, spec),
        *_limits(verdict, dataset, spec),
    ]
    return Story(headline=headline, why=tuple(why), next_steps=tuple(next_steps(verdict, dataset, spec, adapter)))


def _numbers(verdict: Verdict) -> list[str]:
    if verdict.candidate_score is None or verdict.champion_score is None or verdict.gain is None:
        return []
    new, old = plain(verdict.candidate_score), plain(verdict.champion_score)
    asked = count(verdict.records, "record")
    if verdict.outcome == "contaminated":
        return [
            f"The new model scored {new} of 100 points on {asked}, the champion {old}; but it had seen some of them."
        ]
    scored = f"The new model scored {new} of 100 points, the champion {old}: a change of {signed(verdict.gain)}."
    of_them = "of them"
    if verdict.groups != verdict.records:
        groups = count(verdict.groups, "group")
        asked += f" in {groups} (near-duplicates, or of one document), each of which counts once"
        of_them = "of the groups"
    shown = _by_drops(verdict) if "gain_from_new_data" not in verdict.reasons else ()
    return [
        f"Both models answered the same {asked}; neither was trained on them. {scored}",
        f"It did better on {verdict.wins:,} {of_them}, worse on {verdict.losses:,}, equally well on {verdict.ties:,}.",
        *([f"Its change is {listed(shown)}."] if len(shown) > 1 else []),
    ]


def _because(verdict: Verdict, evaluation: Evaluation | None, spec: StepSpec) -> list[str]:
    """Return sentences with the reasons of the decision, the decisive reason first."""
    failed = [guard for guard in verdict.guards if guard.state == "failed"]
    if verdict.outcome == "promoted" and verdict.p_value is not None:
        guarded = ", and no guard failed" if verdict.guards else ""
        won = f"A model that is no better would look like this {luck(verdict.p_value)}{guarded}."
        only = f"The gain is shown only with the records of new drops: {listed(_by_drops(verdict))}."
        return [won, only] if "gain_from_new_data" in verdict.reasons else [won]
    if verdict.outcome == "contaminated" and evaluation is not None and evaluation.records_seen_by_candidate:
        seen = count(evaluation.records_seen_by_candidate, "record")
        return [f"{seen} of those that it was judged on were among its training records."]
    lost = [f"{GUARDS[guard.guard].heading}: {guard_words(guard)}." for guard in failed]
    if verdict.outcome == "guard_failed" and lost:
        return [*([REASONS["nll_not_finite"]] if "nll_not_finite" in verdict.reasons else []), *lost]
    sentences, unsaid = dict(REASONS), {"too_few_records"} if verdict.gain is None else set()
    if verdict.outcome == "worse":
        unsaid |= {"p_above_limit", "gain_below_minimum"}
        if verdict.harm_p_value is not None:
            rarely = f"a model that is no worse would look like this {luck(verdict.harm_p_value)}"
            sentences["harm_shown"] = f"{REASONS['harm_shown'].rstrip('.')}: {rarely}."
    if verdict.gain is not None and verdict.gain > 0:
        least = spec.config.gate.min_gain
        rarely = f"A model that is no better would look like this {luck(verdict.p_value or 0.0)}: that is no proof."
        small = f"The gain is smaller than the settings ask for: {distinct(verdict.gain, least)} is below {least:g}."
        sentences |= {"p_above_limit": rarely, "gain_below_minimum": small}
    return [*(sentences[code] for code in verdict.reasons if code in sentences.keys() - unsaid), *lost]


def _collapsed(verdict: Verdict, spec: StepSpec) -> list[str]:
    """Return a sentence per general suite on which the answers collapsed, with the setting that helps."""
    share = spec.config.train.general_rows
    helps = f"raise train.general_rows (it was {share:g})" if share else f"set train.general_rows = {GENERAL_SHARE:g}"
    return [
        f"The new model {words}. If it is to answer anything but its task, {helps}: general records are mixed into the "
        "training."
        for words in collapse_words(verdict)
    ]


def _unguarded(verdict: Verdict) -> str:
    """Return the drops and tags that have too few records to be guarded, as `drop 3, tag x and 2 more`; "" for none."""
    return first_of(unguarded(verdict), more=verdict.slices_not_listed)


def _by_drops(verdict: Verdict) -> list[str]:
    """Return the gain in words on records of new drops, then on those of drops that the champion knows, if any."""
    slices = {part.kind: f"{signed(part.gain)} on {count(part.records, 'record')}" for part in verdict.slices}
    names = (("unseen", "new"), ("seen", "older"))
    return [f"{slices[kind]} of {name} drops" for kind, name in names if kind in slices]


def _limits(verdict: Verdict, dataset: Dataset, spec: StepSpec) -> list[str]:
    """Return a sentence on the smallest gain that this held-out set can show, or on the missing records; else none."""
    if dataset.shortfall is not None and verdict.gain is None:
        have, need = dataset.shortfall.heldout_rows, dataset.shortfall.needed_heldout_rows
        done = "asked" if verdict.candidate_model_id else "trained"
        records = count(have, "held-out record" if have == verdict.records else "held-out group")
        known = " of drops that the champion knows" if "too_few_seen" in verdict.reasons else ""
        return [f"There are {records}{known}, and a verdict needs {need:,}. Nothing was {done}."]
    if verdict.outcome != "not_shown_better":
        return []
    smallest, gate = verdict.smallest_detectable_gain, spec.config.gate
    if smallest is None:
        return ["With these records no gain, however large, is promoted in 8 of 10 cases."]
    least = f"; the settings ask for {plain(gate.min_gain)}" if gate.min_gain else ""
    whole = verdict.smallest_group_gain
    groups = f" ({plain(whole)} if whole groups of paraphrases gain)" if whole else ""
    gain = f"{plain(smallest)} points or more{groups}"
    return [f"With these records, a gain of {gain} is promoted in 8 of 10 cases{least}."]


def p_value_words(verdict: Verdict, limit: float | None = None) -> str:
    """
    Format the verdict's p-value with its test, and with `limit` if that is given; "" if there is no p-value.

    If the outcome is `worse` it is the p-value for a loss, and the limit is `HARM_P_VALUE` in place of `limit`.
    """
    value, of = verdict.p_value, ""
    if verdict.outcome == "worse" and verdict.harm_p_value is not None:
        value, of, limit = verdict.harm_p_value, " for a loss", limit and HARM_P_VALUE
    if value is None:
        return ""
    limited = f"; the limit is {limit:g}" if limit else ""
    return f"{p_words(value, limit or HARM_P_VALUE)}{of} ({_TESTS[verdict.test or 't']}, one-sided){limited}"


def review_words(review: BlindReview) -> str:
    """Return the result of a blind review in one line."""
    decided = review.candidate + review.champion
    by = f" by {listed(review.judged_by)}" if review.judged_by else ""
    words = (
        f"{decided + review.equal:,} of the {count(review.differing, 'record')} that the models did not answer alike, "
        f"judged blind{by}: the new model's answer is better in {review.candidate:,}, the champion's in "
        f"{review.champion:,}, neither in {review.equal:,}"
    )
    if not decided:
        return f"{words}."
    return f"{words}; {p_words(review.p_value, LEVEL)} (two-sided exact sign test)."
