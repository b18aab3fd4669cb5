"""Decide between candidate and champion from a comparison and the rules."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.artifacts import Dataset, GuardResult, Outcome, Settlement, Shortfall, Verdict
from pipeline.config import GateConfig, GuardConfig
from pipeline.decide import guards, statistics
from pipeline.decide.comparison import Comparison
from pipeline.decide.policy import GUARDS, HARM_P_VALUE, exceeds, is_doubt
from pipeline.decide.power import records_needed, smallest_gain
from pipeline.decide.slices import POINTS, Known, Slice, count_unlisted, find_slices, judged_on, measure_slices
from pipeline.decide.statistics import Floats

#: The reasons for `insufficient_evidence`.
_LACKING = {"no_pinned_heldout", "too_few_seen", "too_few_records"}


@dataclass(frozen=True)
class Rules:
    """The limits for a candidate, the drops that the champion knows, and the records that the candidate has seen."""

    gate: GateConfig = field(default_factory=GateConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    known: Known = field(default_factory=Known)
    seen_by_candidate: int = 0
    """Number of the held-out records that the candidate was trained on."""


def decide_verdict(comparison: Comparison, rules: Rules, pooled: Comparison | None = None) -> Verdict:
    """
    Return the verdict on a candidate: a pure function, the same for any order of the records.

    `weigh` makes the decision; this function adds the numbers for the report, by simulation if the outcome is
    `not_shown_better`, which takes a while. Fields on models, held-out version and earlier uses keep their defaults.
    """
    verdict, part = weigh(comparison, rules, pooled), on_part(comparison, rules)
    seed = int.from_bytes(hashlib.sha256("\n".join(part.ids).encode()).digest()[:8])
    differences, pairs = part.differences(), part.pairs()
    means = pairs.mean(axis=0) * POINTS if len(pairs) else None
    wins, losses = statistics.count_signs(differences)
    low, high = statistics.interval(differences, seed)
    numbers = {
        "candidate_score": None if means is None else float(means[0]),
        "champion_score": None if means is None else float(means[1]),
        "interval": (low * POINTS, high * POINTS),
        "test": "mcnemar" if statistics.is_yes_or_no(differences) else "t",
        "wins": wins,
        "losses": losses,
        "ties": differences.size - wins - losses,
        "slices": measure_slices(comparison, find_slices(comparison, rules.known), seed),
        "slices_not_listed": count_unlisted(comparison),
        **_needed(part, rules, verdict, seed),
    }
    return verdict.model_copy(update=numbers)


def _needed(part: Comparison, rules: Rules, verdict: Verdict, seed: int) -> dict[str, float | int | None]:
    """
    Return the fields of `Verdict` on missing groups for a verdict, or missing gain and groups for a promotion.

    Empty unless the outcome is `insufficient_evidence` or `not_shown_better`.
    """
    least, groups = rules.gate.least_groups(part.metric), verdict.groups
    if verdict.outcome == "insufficient_evidence":
        return {"groups_needed": least, "records_needed": max(0, least - groups) or None}
    if verdict.outcome != "not_shown_better":
        return {}
    smallest, in_groups = (
        smallest_gain(part, partial(promotes, rules=rules), seed, spread=spread) if asked else None
        for spread, asked in ((True, True), (False, groups < len(part.ids)))
    )
    # More records do not enlarge a gain that is below the minimum.
    gain = _gain(part.differences())
    likely = 0.0 if exceeds(rules.gate.min_gain, gain) else gain / POINTS
    needed = records_needed(likely, smallest, groups)
    return {
        "smallest_detectable_gain": None if smallest is None else smallest * POINTS,
        "smallest_group_gain": None if in_groups is None else in_groups * POINTS,
        "records_needed": None if needed is None else max(0, max(needed, least) - groups),
    }


def weigh(comparison: Comparison, rules: Rules, pooled: Comparison | None = None) -> Verdict:
    """
    Return the verdict: promoted if p-value and gain meet the gate's limits on enough groups and no guard fails.

    First, records that the candidate was trained on make it `contaminated`, too few groups or a missing pinned set
    `insufficient_evidence`, and harm shown by the mirrored test (p <= `HARM_P_VALUE`) `worse`. Without a win, a failed
    guard makes it `guard_failed` only if it shows clear harm to old drops or the likelihood. `reasons` are all codes
    that hold, even if promoted. Old drops are guarded on `pooled`, if given. The numbers that `decide_verdict` adds
    keep their defaults.
    """
    gate, part = rules.gate, on_part(comparison, rules)
    differences = part.differences()
    numbers = {
        "gain": _gain(differences),
        "p_value": statistics.gain_p(differences),
        "harm_p_value": statistics.gain_p(-differences),
    }
    slices = find_slices(part, rules.known)
    means = pooled and on_part(pooled, rules)
    checked = guards.check(part, slices, rules.known, rules.guards, means)
    failed = [row for row in checked if row.state == "failed"]
    wins = _wins(differences, gate)
    blaming = _blaming(failed, slices, wins=wins)
    reasons = _reasons(comparison, part, rules, failed, numbers)
    outcome = _outcome(reasons, failed, blaming, wins=wins)
    lost = outcome == "worse" or (outcome == "guard_failed" and bool(blaming))
    return Verdict(
        outcome=outcome,
        reasons=reasons,
        metric=comparison.metric,
        records=len(part.ids),
        groups=differences.size,
        guards=checked,
        # If the champion knows no drop, as a base model, a bad drop cannot be told from a good one.
        blames_new_drops=lost and bool(rules.known.drops),
        pooled=pooled is not None,
        lost_drops=tuple(row.drop for row in failed if row.guard == "slice" and row.drop is not None),
        **numbers,
    )


def settle(verdict: Verdict, trial: Comparison, pooled: Comparison, rules: Rules) -> Settlement | None:
    """
    Return the guards of old drops by the means `pooled`, if these alone stopped a trial by its `verdict`; else `None`.

    Two trainings on the same data that lost by chance lost on different records. `trial` is judged where records are
    too few for a test of means.
    """
    if not is_doubt(verdict):
        return None
    part, means = on_part(trial, rules), on_part(pooled, rules)
    rows = guards.check_old_drops(part, find_slices(part, rules.known), rules.known, rules.guards, means)
    return Settlement(guards=tuple(rows), passed=all(row.state != "failed" for row in rows))


def _reasons(
    comparison: Comparison, part: Comparison, rules: Rules, failed: Sequence[GuardResult], numbers: Mapping[str, float]
) -> tuple[str, ...]:
    """Return the codes of all reasons that hold; `numbers` are the gain and the p-values on `part`."""
    gate, differences, seen = rules.gate, part.differences(), rules.known.seen(part)
    few = differences.size < gate.least_groups(comparison.metric)
    against = {
        "trained_on_heldout": rules.seen_by_candidate > 0,
        **_lacking(gate, few=few, pinned=bool(comparison.pinned.any())),
        "harm_shown": numbers["harm_p_value"] <= HARM_P_VALUE,
        "nll_not_finite": any(row.guard == "nll" and row.candidate is None for row in failed),
        **{GUARDS[row.guard].reason: True for row in failed},
        "p_above_limit": numbers["p_value"] > gate.p_value,
        "gain_below_minimum": exceeds(gate.min_gain, numbers["gain"]),
        # Not shown on the seen records alone.
        "gain_from_new_data": _wins(differences, gate) and not seen.all() and not _wins(part.differences(seen), gate),
    }
    return tuple(code for code, holds in against.items() if holds)


def _blaming(failed: Sequence[GuardResult], slices: Sequence[Slice], *, wins: bool) -> list[GuardResult]:
    """Return those of the failed guards that blame new drops; a lost tag blames none."""
    blame = {"always", "with a win" if wins else "without a win"}
    tags = {part.label for part in slices if part.kind == "tag"}
    return [row for row in failed if GUARDS[row.guard].blames in blame and tags.isdisjoint(row.about)]


def _lacking(gate: GateConfig, *, few: bool, pinned: bool) -> dict[str, bool]:
    """Return whether each reason for `insufficient_evidence` holds, by whether groups are `few`, a record `pinned`."""
    return {
        "no_pinned_heldout": gate.on == "pinned" and not pinned,
        "too_few_seen": few and gate.on == "seen",
        "too_few_records": few and gate.on != "seen",
    }


def promotes(part: Comparison, rules: Rules) -> bool:
    """
    Return whether `weigh` would promote on `part`; faster, for simulations.

    `part` must be restricted by `on_part`, have enough groups and, for a gate on them, pinned records: none of it is
    checked. `rules.seen_by_candidate` is ignored: `weigh` never promotes if it is above 0.
    """
    if not _wins(part.differences(), rules.gate):
        return False
    checked = guards.check(part, find_slices(part, rules.known), rules.known, rules.guards)
    return not any(row.state == "failed" for row in checked)


def _gain(differences: Floats) -> float:
    return float(differences.mean()) * POINTS if differences.size else 0.0


def _wins(differences: Floats, gate: GateConfig) -> bool:
    return not exceeds(gate.min_gain, _gain(differences)) and statistics.gain_p(differences) <= gate.p_value


def on_part(comparison: Comparison, rules: Rules) -> Comparison:
    """Return the comparison restricted to the records that the gate judges on."""
    return comparison.part(judged_on(rules.gate.on, rules.known, comparison.drops, comparison.pinned))


def _outcome(
    reasons: Sequence[str], failed: Sequence[GuardResult], blaming: Sequence[GuardResult], *, wins: bool
) -> Outcome:
    """
    Return the first that holds: contaminated, insufficient evidence, worse, guard failed, promoted, not better.

    A failed guard blocks any promotion. If the candidate did not win, the outcome is `guard_failed` only if the
    likelihood is not finite or a failed guard that blames new drops has p <= `HARM_P_VALUE`.
    """
    if "trained_on_heldout" in reasons:
        return "contaminated"
    if not _LACKING.isdisjoint(reasons):
        return "insufficient_evidence"
    if "harm_shown" in reasons:
        return "worse"
    sure = any(row.p_value is not None and row.p_value <= HARM_P_VALUE for row in blaming)
    if failed and (wins or sure or "nll_not_finite" in reasons):
        return "guard_failed"
    return "promoted" if wins else "not_shown_better"


def early_verdict(dataset: Dataset, shortfall: Shortfall, gate: GateConfig) -> Verdict:
    """Return the verdict `insufficient_evidence` of a run with too little data, in which nothing was evaluated."""
    have, need, on_seen = shortfall.heldout_rows, shortfall.needed_heldout_rows, gate.on == "seen"
    reasons = _lacking(gate, few=have < need, pinned=dataset.heldout_pinned)
    return Verdict(
        outcome="insufficient_evidence",
        reasons=tuple(code for code, holds in reasons.items() if holds),
        metric=dataset.metric,
        records=have if on_seen else dataset.heldout_rows,
        groups=have,
        groups_needed=need,
        rows_needed=None if dataset.heldout_pinned or on_seen else shortfall.needed_rows,
    )
