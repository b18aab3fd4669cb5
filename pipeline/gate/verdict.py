"""Decide between candidate and champion from a comparison and the rules."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.artifacts import Dataset, GuardResult, Outcome, Shortfall, Verdict
from pipeline.config import GateConfig, GuardConfig
from pipeline.gate import guards, statistics
from pipeline.gate.comparison import Comparison
from pipeline.gate.explain import short_line
from pipeline.gate.guards import Guards
from pipeline.gate.power import (
    LOWER_POWERS,
    POWER,
    Detectable,
    GainTest,
    GuardModel,
    asked_power,
    records_needed,
    smallest_detectable_gain,
)
from pipeline.gate.reasons import GUARD_REASONS, NO_FAULT_OF_DROPS, WITHOUT_REFERENCES, blame_drops
from pipeline.gate.slices import (
    LEAST_TESTED,
    POINTS,
    Known,
    Slice,
    count_unlisted,
    find_slices,
    judged_on,
    measure_slices,
)
from pipeline.gate.statistics import Floats
from pipeline.metrics.registry import METRICS

#: Largest p-value of a loss that counts as harm shown, whatever the gate asks of a gain.
HARM_P_VALUE = 0.01


#: The same for a guard of a candidate that did not win: about ten guards together then err as seldom as `worse`.
GUARD_HARM_P_VALUE = 0.001


_TESTS = {True: "sign flip, paired t and skewness-adjusted t", False: "exact McNemar"}


@dataclass(frozen=True)
class Rules:
    """What a candidate is held to, and what is known about the records."""

    gate: GateConfig = field(default_factory=GateConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    known: Known = field(default_factory=Known)
    seen_by_candidate: int = 0
    repinned: Mapping[int, int] = field(default_factory=dict)
    """Pinned drops that came after the champion was judged, and how many earlier references each of them replaced."""


@dataclass(frozen=True)
class Decision:
    """A decision and what it was made from; gains in points."""

    outcome: Outcome
    reasons: tuple[str, ...]
    part: Comparison
    """The records that the gate judges on."""
    slices: tuple[Slice, ...]
    guards: Guards
    gain: float
    p_value: float
    """Exact where it is small enough to promote; above that it may be the t-test's alone, which is no larger."""
    seed: int


def judge(comparison: Comparison, rules: Rules, *, used: tuple[int, int] = (0, 0)) -> Verdict:
    """
    Return the verdict on a candidate: a pure function, the same for any order of the records.

    `weigh` decides; this adds the numbers that a person reads. `used` counts the candidates that were judged before, in
    all and on exactly these records.
    """
    found = weigh(comparison, rules)
    excused = blame_drops(found.outcome, found.reasons) and _is_excused(found, comparison, rules)
    metric, part = METRICS[comparison.metric], found.part
    differences, pairs = part.differences(), part.scores[comparison.metric]
    means = pairs.mean(axis=0) * POINTS if len(pairs) else None
    wins, losses = int(np.count_nonzero(differences > 0)), int(np.count_nonzero(differences < 0))
    low, high = statistics.interval(differences, found.seed)
    least = _least_records(comparison, rules.gate)
    smallest, needed = _power(found, rules, least)
    if found.outcome == "insufficient_evidence":
        smallest = None  # on such a set no gain is promoted
    verdict = Verdict(
        outcome=found.outcome,
        reasons=found.reasons,
        sentence="",
        metric=metric.name,
        records=differences.size,
        candidate_score=None if means is None else float(means[0]),
        champion_score=None if means is None else float(means[1]),
        gain=found.gain,
        interval=(low * POINTS, high * POINTS),
        p_value=statistics.one_sided_p(differences, continuous=metric.continuous, seed=found.seed),
        test=_TESTS[metric.continuous],
        wins=wins,
        losses=losses,
        ties=differences.size - wins - losses,
        smallest_detectable_gain=None if smallest is None else smallest.gain * POINTS,
        detectable_power=None if smallest is None else smallest.power,
        costliest_guards=None if smallest is None else smallest.costliest,
        records_needed=None if found.outcome == "promoted" else needed,
        guards=found.guards.rows,
        slices=measure_slices(comparison, find_slices(comparison, rules.known), found.seed),
        references_changed=sum(rules.repinned.values()) if excused else 0,
        slices_not_listed=count_unlisted(comparison),
        uses=used[0],
        same_set_uses=used[1],
    )
    return verdict.model_copy(update={"sentence": short_line(verdict, least)})


def weigh(comparison: Comparison, rules: Rules) -> Decision:
    """
    Decide: p-value and mean gain within the gate's limits on enough records, and no guard failed.

    `worse` needs the mirrored test to show harm. A gain that is shown only together with the records of new drops
    counts where no slice of seen records lost: such a drop brings its own yardstick.
    """
    gate = rules.gate
    part = on_part(comparison, rules)
    differences, continuous = part.differences(), METRICS[comparison.metric].continuous
    seed = int.from_bytes(hashlib.sha256("\n".join(part.ids).encode()).digest()[:8])
    slices = find_slices(part, rules.known)
    checked = guards.check(part, slices, rules.guards, seed)
    shown = _Shown(continuous, gate, seed)
    gain, p_value = shown.gain(differences), shown.p_value(differences)
    harm = statistics.one_sided_p(-differences, continuous=continuous, seed=seed, relevant=HARM_P_VALUE)
    wins = shown.wins(gain, p_value)
    only_new = wins and not shown.without_new(part, rules.known)
    few = differences.size < _least_records(comparison, gate)
    against = {
        "trained_on_heldout": rules.seen_by_candidate > 0,
        "no_pinned_heldout": gate.on == "pinned" and not comparison.pinned.any(),
        "too_few_seen": few and gate.on == "seen",
        "too_few_records": few and gate.on != "seen",
        "harm_shown": harm <= HARM_P_VALUE,
        "nll_not_finite": any(row.guard == "nll" and row.candidate is None for row in checked.failed),
        **{GUARD_REASONS[row.guard]: True for row in checked.failed},
        "p_above_limit": p_value > gate.alpha,
        "gain_below_minimum": not shown.is_large(gain),
        "seen_lost": only_new and bool(checked.seen_lost),
        "gain_from_new_data": only_new,
    }
    reasons = tuple(code for code, holds in against.items() if holds)
    outcome = _outcome(reasons, checked, wins=wins)
    return Decision(outcome, reasons, part, slices, checked, gain, p_value, seed)


@dataclass(frozen=True)
class _Shown:
    """What the gate asks of a gain."""

    continuous: bool
    gate: GateConfig
    seed: int

    def gain(self, differences: Floats) -> float:
        return float(differences.mean()) * POINTS if differences.size else 0.0

    def p_value(self, differences: Floats) -> float:
        return statistics.one_sided_p(differences, continuous=self.continuous, seed=self.seed, relevant=self.gate.alpha)

    def is_large(self, gain: float) -> bool:
        # A mean of hundredths may miss its value in the last bits.
        return gain >= self.gate.min_gain - 1e-9

    def wins(self, gain: float, p_value: float) -> bool:
        return p_value <= self.gate.alpha and self.is_large(gain)

    def without_new(self, part: Comparison, known: Known) -> bool:
        """Return whether the gain is shown on the seen records alone."""
        mask = known.seen(part)
        differences = part.differences()[mask]
        return bool(mask.all()) or self.wins(self.gain(differences), self.p_value(differences))


def _is_excused(found: Decision, comparison: Comparison, rules: Rules) -> bool:
    """
    Say whether all that blames the drops depends on references that were replaced since the champion was judged.

    What the other records show counts from `LEAST_TESTED` of them on, though fewer than a verdict needs: this asks
    whether one stands, not for a new one.
    """
    changed = comparison.replaced & np.isin(comparison.drops, list(rules.repinned))
    if not changed.any() or _blames_whatever_the_references(found):
        return False
    gate = rules.gate
    least = {name: min(getattr(gate, name), LEAST_TESTED) for name in ("min_records", "min_records_continuous")}
    eased = replace(rules, gate=gate.model_copy(update=least))
    rest = weigh(comparison.part(~changed), eased)
    return not blame_drops(rest.outcome, rest.reasons)


def _blames_whatever_the_references(found: Decision) -> bool:
    """Say whether a decision that blames drops would do so by what no reference has a part in."""
    wins = not {"p_above_limit", "gain_below_minimum"} & set(found.reasons)
    own = [row for row in found.guards.failed if row.guard in WITHOUT_REFERENCES]
    return "nll_not_finite" in found.reasons or any(wins or _is_sure(row) for row in own)


def _is_sure(row: GuardResult) -> bool:
    """Say whether a guard that failed proves harm as `worse` does."""
    return row.p_value is not None and row.p_value <= GUARD_HARM_P_VALUE


def on_part(comparison: Comparison, rules: Rules) -> Comparison:
    """Return the comparison on the records that the gate judges on."""
    return comparison.part(judged_on(rules.gate.on, rules.known, comparison.drops, comparison.pinned))


def _least_records(comparison: Comparison, gate: GateConfig) -> int:
    return gate.min_records_continuous if METRICS[comparison.metric].continuous else gate.min_records


def _outcome(reasons: Sequence[str], checked: Guards, *, wins: bool) -> Outcome:
    """
    Return the verdict that the reasons amount to: whether anything can be said goes before what it is.

    A guard stands against any promotion. As the verdict on a candidate that did not win it needs the proof that `worse`
    needs, as this verdict, too, holds back the drops that were new.
    """
    if "trained_on_heldout" in reasons:
        return "contaminated"
    if {"no_pinned_heldout", "too_few_seen", "too_few_records"} & set(reasons):
        return "insufficient_evidence"
    if "harm_shown" in reasons:
        return "worse"
    blaming = [row for row in checked.failed if row.guard not in NO_FAULT_OF_DROPS]
    if checked.failed and (wins or any(map(_is_sure, blaming)) or "nll_not_finite" in reasons):
        return "guard_failed"
    return "promoted" if wins and "seen_lost" not in reasons else "not_shown_better"


def _power(found: Decision, rules: Rules, least: int) -> tuple[Detectable | None, int | None]:
    """Return the smallest gain that this decision would let pass, and the records that are missing."""
    differences = found.part.differences()
    test = GainTest(METRICS[found.part.metric].continuous, rules.gate.alpha, rules.gate.min_gain / POINTS)
    if not differences.size:
        return None, None
    guard_model = GuardModel(differences, guards.watched(found.part, found.slices, rules.guards), test, found.seed)
    tried = (smallest_detectable_gain(differences, test, guard_model, power) for power in (POWER, *LOWER_POWERS))
    smallest = next((one for one in tried if one is not None), None)
    # Where no gain is shown at all there are too few records, and it is not for the guards.
    shows = smallest is not None or smallest_detectable_gain(differences, test) is not None
    needed = records_needed(differences, test, asked_power(smallest) if shows else POWER)
    missing = None if needed is None else max(0, max(needed, least) - differences.size)
    return smallest, missing


def early_verdict(dataset: Dataset, shortfall: Shortfall, gate: GateConfig) -> Verdict:
    """Return the verdict for too little data: no model was trained for it, or one that there is nothing to ask."""
    have, need = shortfall.heldout_rows, shortfall.needed_heldout_rows
    unpinned = gate.on == "pinned" and not dataset.heldout_pinned
    reasons = {"no_pinned_heldout": unpinned, "too_few_records": have < need}
    verdict = Verdict(
        outcome="insufficient_evidence",
        reasons=tuple(code for code, holds in reasons.items() if holds),
        sentence="",
        metric=dataset.metric,
        records=have,
    )
    return verdict.model_copy(update={"sentence": short_line(verdict, need)})
