"""The verdict for a person who does not read statistics: what was decided, why, and what to do now."""

import math
from collections.abc import Callable, Sequence

from pipeline.artifacts import Dataset, Evaluation, GuardResult, Outcome, Verdict
from pipeline.config import RunConfig
from pipeline.contract import StepSpec
from pipeline.gate.reasons import REASONS, excuse_drops
from pipeline.report.facts import NextStep, Reason, Story
from pipeline.wording import cases, count, luck, plain, signed

#: What a code of the verdict's reasons means to somebody who does not know it; others keep the gate's few words.
_REASONS = {
    "no_pinned_heldout": "The gate is to judge on a held-out set of your own, and none was dropped.",
    "too_few_records": "There are too few held-out records for a verdict.",
    "harm_shown": "The loss is larger than chance would explain.",
    "nll_not_finite": "The new model's likelihood of the expected answers is not a number: it is broken.",
    "p_above_limit": "The gain could well be chance.",
    "gain_below_minimum": "The gain is smaller than the settings ask for.",
    "gain_from_new_data": "The gain is only there on records of drops that the champion never saw.",
    "trained_on_heldout": "The new model was trained on records that it was to be judged on.",
}
_HEADLINES: dict[Outcome, str] = {
    "promoted": "The new model is better.",
    "worse": "The new model is worse. The champion stays.",
    "not_shown_better": "The new model was not shown to be better. The champion stays.",
    "insufficient_evidence": "There is too little data to decide. The champion stays.",
    "guard_failed": "The new model loses something that it must not lose. The champion stays.",
    "contaminated": "This result cannot be trusted. The champion stays.",
}
#: What a failed guard found, where it is no loss of this model: it may have lost nothing, or others before it.
_FOUND = {
    "general_base": "What was lost since the base model, earlier champions included",
    "former": "What it falls behind",
    "floor": "What is not reached",
    "latency": "What takes longer",
    "size": "What is larger",
    "judge": "What the judge says",
}
_KEPT = "No drop is held back for this: all are trained on again, together with the next ones."
BADGES: dict[Outcome, str] = {
    "promoted": "Promoted",
    "worse": "Worse",
    "not_shown_better": "Not shown better",
    "insufficient_evidence": "Insufficient evidence",
    "guard_failed": "Guard failed",
    "contaminated": "Contaminated",
}


def reasons(verdict: Verdict) -> tuple[Reason, ...]:
    """Return what stood against promotion, each code with its words."""
    return tuple(
        Reason(code=code, words=_REASONS.get(code) or _sentence(REASONS.get(code, code.replace("_", " "))))
        for code in verdict.reasons
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def tell(verdict: Verdict, dataset: Dataset, evaluation: Evaluation | None, spec: StepSpec) -> Story:
    """Return the story of a verdict; `spec` is that of the step which made it."""
    config = spec.config
    headline = _HEADLINES[verdict.outcome]
    if verdict.outcome == "guard_failed":
        headline = _guarded(verdict.reasons)
    if verdict.outcome == "promoted":
        # Nobody knows yet whether it does: a drop that it was made from may be withdrawn before the run is concluded.
        manual = config.gate.approval == "manual"
        headline += " It waits for your approval." if manual else " It wins."
    why = (*_numbers(verdict), *_because(verdict, evaluation), *_excuse(verdict), *_limits(verdict, dataset, config))
    if verdict.yardstick is not None:
        why = (*why, verdict.yardstick)
    if verdict.references_changed:
        steps: Sequence[NextStep] = _after_replaced(dataset, spec)
    else:
        steps = _next_steps(verdict, dataset, config, spec.run)
    return Story(headline=headline, why=why, next_steps=tuple(steps))


def _guarded(codes: Sequence[str]) -> str:
    """Return the headline where a guard failed: what is beyond one is not always something that this model lost."""
    if excuse_drops(codes):
        return "The new model gains, but a guard stands against it. The champion stays."
    headline = _HEADLINES["guard_failed"]
    gains = not {"p_above_limit", "gain_below_minimum"} & set(codes)
    return headline.replace("loses", "gains, but loses") if gains else headline


def _numbers(verdict: Verdict) -> list[str]:
    if verdict.candidate_score is None or verdict.champion_score is None or verdict.gain is None:
        return []
    new, old = plain(verdict.candidate_score), plain(verdict.champion_score)
    asked = count(verdict.records, "record")
    if verdict.outcome == "contaminated":
        words = (
            f"The new model scored {new} of 100 points on {asked}, the champion {old}; but it had seen some of them."
        )
        return [words]
    scored = f"The new model scored {new} of 100 points, the champion {old}: a change of {signed(verdict.gain)}."
    return [
        f"Both models answered the same {asked} that neither was trained on. {scored}",
        f"It answered {verdict.wins:,} of them better, {verdict.losses:,} worse and {verdict.ties:,} equally well.",
    ]


def _because(verdict: Verdict, evaluation: Evaluation | None) -> list[str]:
    if verdict.outcome == "promoted" and verdict.p_value is not None:
        guarded = ", and no guard stands against it" if verdict.guards else ""
        return [f"A model that is no better would look like this {luck(verdict.p_value)}{guarded}."]
    if verdict.outcome == "guard_failed":
        failed = [guard for guard in verdict.guards if guard.state == "failed"]
        found = [f"{_FOUND.get(guard.guard, 'What it loses')}: {guard_words(guard)}." for guard in failed]
        return found or [reason.words for reason in reasons(verdict)]
    if verdict.outcome == "contaminated" and evaluation is not None and evaluation.records_seen_by_candidate:
        seen = count(evaluation.records_seen_by_candidate, "record")
        return [f"{seen} of those that it was judged on were among its training rows."]
    unproven = verdict.outcome == "not_shown_better"
    if unproven and "p_above_limit" in verdict.reasons and verdict.p_value is not None and (verdict.gain or 0) > 0:
        first = [f"A model that is no better would look like this {luck(verdict.p_value)}: that is no proof."]
        return first if "gain_below_minimum" not in verdict.reasons else [*first, _REASONS["gain_below_minimum"]]
    told_by_limits = "too_few_records" if verdict.gain is None else ""
    return [reason.words for reason in reasons(verdict) if reason.code != told_by_limits]


def _excuse(verdict: Verdict) -> list[str]:
    """Say that a bad verdict depends on references that the champion was not judged by."""
    if not verdict.references_changed:
        return []
    replaced = count(verdict.references_changed, "pinned reference")
    were = "was" if verdict.references_changed == 1 else "were"
    return [f"But {replaced} {were} replaced since the champion was judged, and without them this would not be shown."]


def _limits(verdict: Verdict, dataset: Dataset, config: RunConfig) -> list[str]:
    """Say what this held-out set could have shown, where that is what was missing."""
    if dataset.shortfall is not None and verdict.gain is None:
        have, need = dataset.shortfall.heldout_rows, dataset.shortfall.needed_heldout_rows
        done = "asked" if verdict.candidate_model_id else "trained"
        return [f"There are {count(have, 'held-out record')}, and a verdict needs {need:,}. Nothing was {done}."]
    smallest = verdict.smallest_detectable_gain
    if verdict.outcome != "not_shown_better" or smallest is None:
        return []
    least = f"; the settings ask for {plain(config.gate.min_gain)}" if config.gate.min_gain else ""
    often = cases(verdict.detectable_power)
    return [f"With these records, a gain of {plain(smallest)} points or more is promoted in {often}{least}."]


def guard_words(guard: GuardResult) -> str:
    """Return one guard's finding in words, as `token F1 +0.3 points (the limit is 2.0 points)`."""
    words = guard.label
    if guard.guard == "floor":
        # Its limit is the floor, which stands in the label; the change is the way to it.
        found = "scored on none of these records" if guard.candidate is None else f"{plain(guard.candidate)} points"
        return f"{words}: {found}"
    if guard.guard == "judge" and guard.candidate is not None and guard.champion is not None:
        return f"{words}: {guard.candidate:g} of the new model's, {guard.champion:g} of the champion's"
    if guard.change is not None:
        words += f" {change_words(guard)}"
    if guard.margin is not None:
        words += f" (the limit is {margin_words(guard)})"
    return words


def change_words(guard: GuardResult) -> str:
    """Return a guard's change in its unit."""
    if guard.change is None:
        return ""
    if guard.unit == "times":
        return f"{plain(guard.change, 2)} times"
    return f"{signed(guard.change, digits(guard))} {guard.unit}"


def margin_words(guard: GuardResult) -> str:
    """Return what a guard lets pass, in its unit."""
    if guard.margin is None:
        return ""
    return f"{plain(guard.margin, 2 if guard.unit in {'times', 'nats'} else 1)} {guard.unit}"


def digits(guard: GuardResult) -> int:
    """Return how many decimals a guard's numbers have."""
    return {"nats": 3, "times": 2, "records": 0}.get(guard.unit, 1)


def _next_steps(verdict: Verdict, dataset: Dataset, config: RunConfig, run: int) -> Sequence[NextStep]:
    tell_next: dict[Outcome, Callable[[], list[NextStep]]] = {
        "promoted": lambda: _after_a_win(verdict, config, run),
        "worse": _after_harm,
        "not_shown_better": lambda: _after_no_proof(verdict, dataset),
        "insufficient_evidence": lambda: _after_too_little(verdict, dataset),
        "guard_failed": lambda: _after_guards(verdict, config, run),
        "contaminated": lambda: [
            NextStep(words="Judge it on other records: drop a held-out set that no drop has rows of."),
            NextStep(words="See which drops are new in this run.", command=f"dropforge show {run}"),
        ],
    }
    return tell_next[verdict.outcome]()


def _after_a_win(verdict: Verdict, config: RunConfig, run: int) -> list[NextStep]:
    undo = NextStep(
        words="If it disappoints in use, let the champion before it serve again.",
        command=f"dropforge rollback{config.track_option} --reason TEXT",
    )
    costs = " The answers that became worse, below, show what it costs." if verdict.losses else ""
    if config.gate.approval == "manual":
        return [NextStep(words=f"Let it serve.{costs}", command=f"dropforge promote {run}")]
    unless = (
        "unless a drop that it was trained or judged on was withdrawn meanwhile, or the track was rolled back from "
        "this very model before: then it waits for you"
    )
    return [NextStep(words=f"Nothing has to be done, {unless}.{costs}"), undo]


def _after_guards(verdict: Verdict, config: RunConfig, run: int) -> list[NextStep]:
    """Return what helps against the guards that failed; only where one of them speaks of harm, drops are looked at."""
    if not excuse_drops(verdict.reasons):
        return _after_harm()
    failed = [guard for guard in verdict.guards if guard.state == "failed"]
    steps = list(dict.fromkeys(step for guard in failed for step in _against(guard, config)))
    if {guard.guard for guard in failed} <= {"latency", "size", "judge"}:
        steps.append(
            NextStep(
                words="If that is no harm to you, let it serve all the same.",
                command=f"dropforge promote {run} --force --reason TEXT",
            )
        )
    return [*steps, NextStep(words=_KEPT)]


def _against(guard: GuardResult, config: RunConfig) -> list[NextStep]:
    """Return what helps against one guard that says nothing against the new drops."""
    rollback = f"dropforge rollback{config.track_option}"
    missing = guard.candidate is None
    steps = {
        "general_base": [
            NextStep(words="Add general rows: they bring back what was lost."),
            NextStep(
                words="Or let the champion before today's serve again, if it lost less.",
                command=f"{rollback} --reason TEXT",
            ),
        ],
        "former": [
            NextStep(
                words="If the former champion is the better one, let it serve again.",
                command=f"{rollback} --to GENERATION --reason TEXT",
            )
        ],
        "floor": [
            NextStep(
                words="Take the floor out, or drop rows that it can be scored by (guards.floors)."
                if missing
                else "Drop more rows of the kind that the floor asks for, or lower it (guards.floors)."
            )
        ],
        "latency": [NextStep(words="Look for longer answers in the new drops, or allow more time (guards.latency).")],
        "size": [NextStep(words="Allow a larger model, if there is room for it (guards.size).")],
        "judge": [NextStep(words="Read the answers that changed, below, and see whether the judge is right.")],
    }
    return steps[guard.guard]


def _after_harm() -> list[NextStep]:
    return [
        NextStep(words="Read the answers that became worse, below: wrong or odd data in a new drop shows there."),
        NextStep(
            words="If a drop is to blame, take it out of later runs.",
            command="dropforge drops withdraw DROP --reason TEXT",
        ),
        NextStep(
            words="If the drop is right after all, put it back when it is held.",
            command="dropforge drops restore DROP --reason TEXT",
        ),
    ]


def _after_replaced(dataset: Dataset, spec: StepSpec) -> list[NextStep]:
    """Return what helps where a bad verdict says more of new references than of the new drops."""
    names = {drop.id: drop.name for drop in (*dataset.drops, *spec.drops)}
    steps = [
        NextStep(
            words=f"Look at the pinned drop {drop}{f' ({names[drop]})' if drop in names else ''} first: it gives "
            "other answers than an earlier one. If they are wrong, take it out of later runs.",
            command=f"dropforge drops withdraw {drop} --reason TEXT",
        )
        for drop in spec.champion.not_judged_by(dataset.pins_changed)
    ]
    return [*steps, NextStep(words=_KEPT)]


def _after_no_proof(verdict: Verdict, dataset: Dataset) -> list[NextStep]:
    steps = []
    if "established_lost" in verdict.reasons:
        words = "See in the slices, below, what records of older drops lost: new ones do not make up for it."
        steps.append(NextStep(words=words))
    elif verdict.records_needed:
        records = count(verdict.records_needed, "more held-out record")
        rows = _rows_for(verdict.records_needed, dataset)
        given = f", which about {rows:,} rows like these give" if rows else ""
        words = f"Drop more data: about {records} would show this gain if it is real{given}."
        steps.append(NextStep(words=words))
    elif "p_above_limit" not in verdict.reasons:
        words = "The gain is no luck, but it is small: drop more or other data, or ask for less (gate.min_gain)."
        steps.append(NextStep(words=words))
    else:
        steps.append(NextStep(words="Drop more or other data: what is there taught the model nothing that shows."))
    steps.append(NextStep(words="Nothing is lost: these drops are trained on again, together with the next ones."))
    return steps


def _rows_for(records: int, dataset: Dataset) -> int:
    """Return about how many rows bring so many held-out records, to two digits; 0 where drops bring none."""
    rows = dataset.train_rows + dataset.dev_rows + dataset.heldout_rows
    if dataset.heldout_pinned or not dataset.heldout_rows:
        return 0
    wanted = records * rows / dataset.heldout_rows
    step = int(10 ** max(0, math.floor(math.log10(wanted)) - 1))
    return math.ceil(wanted / step) * step


def _after_too_little(verdict: Verdict, dataset: Dataset) -> list[NextStep]:
    folder = "Drop a file of records into the track's folder heldout."
    if "no_pinned_heldout" in verdict.reasons:
        return [NextStep(words=folder)]
    short = dataset.shortfall
    if dataset.heldout_pinned:
        missing = "" if short is None else f" {short.needed_heldout_rows - short.heldout_rows:,} more are needed."
        return [NextStep(words=folder + missing)]
    if short is not None:
        return [NextStep(words=f"Drop about {count(short.needed_rows, 'more row')} of the same kind.")]
    if verdict.records_needed:
        return [NextStep(words=f"Drop more rows: {count(verdict.records_needed, 'more held-out record')} are needed.")]
    return [NextStep(words="Drop more rows of the same kind.")]
