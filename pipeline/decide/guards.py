"""
Guards: checks for harm that block the promotion of a winning candidate. Each rule is one function.

A guard fails if harm is shown, not if its absence is unproven. `pipeline.decide.policy` has its level, label and words,
and the fewest groups of records on which it is tested; on fewer it is only displayed. The setting `guards.stop` names
the guards that block a promotion; the others are only shown. `bench/gate.py` measures each guard (true gain +10 points,
500 records). Its cost is by how many percentage points fewer good candidates are promoted with it. Its benefit is how
often a truly bad winner is promoted with it, in per cent, compared with how often without it (in parentheses).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import special

from pipeline.artifacts import GuardResult
from pipeline.config import GuardConfig
from pipeline.decide import policy, statistics
from pipeline.decide.comparison import Comparison
from pipeline.decide.policy import exceeds, is_beyond, is_shown
from pipeline.decide.slices import POINTS, Known, Slice
from pipeline.decide.statistics import Floats
from pipeline.metrics.degenerate import COLLAPSED, DEGENERATE
from pipeline.metrics.registry import METRICS


def check(
    comparison: Comparison, slices: Sequence[Slice], known: Known, config: GuardConfig, pooled: Comparison | None = None
) -> tuple[GuardResult, ...]:
    """
    Return the guards' results on the compared records; without data most have none, as `judge` without a judge.

    The state is "failed" or "passed", or "shown" if `config.stop` does not name the guard or nothing can be decided, as
    by most guards on too few groups. Old drops are judged on `pooled`, if given (`check_old_drops`).

    What all of them cost a candidate that is truly 5 points better everywhere, in per cent of those that win the test
    (exact match, three former champions, 200 simulated each; in brackets with ten tags): 10 drops of 100 records 5 [6],
    20 of 100 4 [4], 20 of 50 2 [3], 40 of 25 2 [3]. A candidate that learns a new kind of task and is unchanged on old
    drops of 150 records pays 13 with one of them, 44 with four, before its trial.
    """
    rows = [
        *check_old_drops(comparison, slices, known, config, pooled),
        *_suites(comparison, config),
        *_collapse(comparison),
        *_likelihood(comparison, config.nll),
        *_degenerate(comparison, config.degenerate),
        *_floors(comparison, config),
        *_judge(comparison),
    ]
    return tuple(row if row.guard in config.stop else row.model_copy(update={"state": "shown"}) for row in rows)


def check_old_drops(
    comparison: Comparison, slices: Sequence[Slice], known: Known, config: GuardConfig, pooled: Comparison | None = None
) -> list[GuardResult]:
    """Return `check`'s results of `slice` and `anchor`, by `pooled` where it has enough records, else `comparison`."""
    rows, *means = (
        [*_slices(each, slices, known, config.slices), *_anchor(each, known, config.anchor)]
        for each in (comparison, pooled)
        if each is not None
    )
    for two in means:
        rows = [row if mean.p_value is None else mean for row, mean in zip(rows, two, strict=True)]
    return [row if row.guard in config.stop else row.model_copy(update={"state": "shown"}) for row in rows]


def _slices(comparison: Comparison, slices: Sequence[Slice], known: Known, margin: float) -> Iterator[GuardResult]:
    """
    Yield a result for all seen records, and for those of each known drop and tag; a significant or large loss fails.

    Significant is p <= .05 over all slices of a kind together (Holm 1979). Large is a loss beyond the margin on 100
    groups; where `MANY` slices have as many, it must also have an unadjusted p <= .05. New records are not tested, nor
    tags that only they have: a gain may come from them, but the champion has no knowledge of them that could be lost.
    """
    seen = known.seen(comparison)
    tested = [
        (part, comparison.pairs(part.mask & seen))
        for part in slices
        if (part.kind in {"seen", "tag"} or part.drop is not None) and (part.mask & seen).any()
    ]
    many = sum(len(pair) >= policy.LEAST_FOR_MARGIN for _, pair in tested) >= policy.MANY
    for kind in ("seen", "drop", "tag"):
        of_kind = [part for part in tested if part[0].kind == kind]
        rows = [_row("slice", (part.label,), pair, margin) for part, pair in of_kind]
        for (part, pair), row, adjusted in zip(of_kind, rows, _adjusted(rows), strict=True):
            is_large = len(pair) >= policy.LEAST_FOR_MARGIN and is_beyond(row) and (is_shown(row) or not many)
            yield _fail_if(adjusted, is_large or is_shown(adjusted)).model_copy(update={"drop": part.drop})


def _suites(comparison: Comparison, config: GuardConfig) -> Iterator[GuardResult]:
    """
    Yield a result per general suite against champion and base model; a loss beyond the margin fails at p <= .01.

    Against the champion this costs .6 points; a true loss of 10 points is promoted in 8 % (53). Against the base model,
    as a line of champions can lose a little each time, it costs nothing; 6 points more of loss than a champion's 8 are
    promoted in 10 % (66). A candidate that is no further below the base than the champion passes: it may regain a part
    of a loss. Suites of free questions are left to `_collapse`.
    """
    for suite in (suite for suite in comparison.suites if suite.collapsed is None):
        yield _tested(_row("general", (suite.name,), suite.scores, config.general))
        if suite.base is not None:
            pair = np.column_stack((suite.scores[:, 0], suite.base))
            row = _tested(_row("general_base", (suite.name,), pair, config.general_base))
            yield _no_further(row, suite.scores[:, 0] - suite.scores[:, 1])


def _collapse(comparison: Comparison) -> Iterator[GuardResult]:
    """
    Yield a result per suite of free questions; more collapsed answers than the base model's fail at p <= .01.

    The test is McNemar's. An answer has collapsed if it is a label, empty or very short. A candidate with no more of
    them than the champion passes. A track of labels may want such answers, so this guard blocks nothing unless the
    settings name it.
    """
    for suite in comparison.suites:
        if suite.collapsed is None:
            continue
        candidate, champion = suite.collapsed["candidate"], suite.collapsed["champion"]
        base = suite.collapsed.get("base", champion)
        changes = [bool(new) - bool(old) for new, old in zip(candidate, base, strict=True)]
        total, before, usual = (sum(map(bool, kinds)) for kinds in (candidate, champion, base))
        row = _result(
            "collapse",
            (suite.name,),
            tested=len(candidate) >= policy.LEAST_TESTED,
            records=len(candidate),
            candidate=total,
            champion=usual,
            change=total - usual,
            p_value=statistics.mcnemar_exact(changes.count(1), changes.count(-1)),
            parts={kind: candidate.count(kind) for kind in COLLAPSED},
        )
        yield _fail_if(row, is_shown(row) and total > before)


def _anchor(comparison: Comparison, known: Known, margin: float) -> Iterator[GuardResult]:
    """
    Yield a result per seen drop against the former champion best on it; a loss beyond the margin fails at p <= .05.

    The p-values are adjusted over the drops (Holm 1979). 4 points more of loss on a drop that has lost 6 are promoted
    in 47 % (53). A candidate that is no worse than the champion on the drop passes.
    """
    seen, scores = known.seen(comparison), comparison.scores[comparison.metric][:, 0]
    best, masks = [], []
    for drop in np.unique(comparison.drops[seen & ~comparison.pinned]).tolist():
        mask = seen & (comparison.drops == drop)
        pairs = {of: comparison.by_group(np.column_stack((scores, x)), mask) for of, x in comparison.former.items()}
        rows = [_row("anchor", (known.label(drop), of), pair, margin) for of, pair in pairs.items() if len(pair)]
        if rows:
            best.append(min(rows, key=lambda row: (row.p_value is None, row.change)).model_copy(update={"drop": drop}))
            masks.append(mask)
    for row, mask in zip(_adjusted(best), masks, strict=True):
        yield _no_further(_tested(row), comparison.differences(mask))


def _no_further(row: GuardResult, changes: Floats) -> GuardResult:
    """Return `row`, with a note and passed if it failed but the mean of `changes`, candidate - champion, is no loss."""
    if row.state != "failed" or exceeds(0.0, float(changes.mean())):
        return row
    return row.model_copy(update={"state": "passed", "note": "not_below_champion"})


def _likelihood(comparison: Comparison, margin: float) -> Iterator[GuardResult]:
    """
    Yield the result for the references' mean negative log-likelihood per token; nothing if there is no record.

    It fails if it is not finite, or if it rose beyond the margin, on 100 groups or with p <= .05 (difference of ratios,
    Cochran 1977, 6.4). Costs nothing; a rise of .15 nats is promoted in 0 % (98) if records differ by .2 nats from
    model to model, in 49 (93) if by more.
    """
    if not comparison.ids:
        return
    sums, tokens = (comparison.sums(pair) for pair in comparison.nll)
    candidate, champion = (sums.sum(axis=0) / tokens.sum(axis=0)).tolist()
    change, error = statistics.ratio_change(sums, tokens)
    p_value = float(special.ndtr(-change / error)) if error > 0 else None
    shown = len(sums) >= policy.LEAST_TESTED and p_value is not None and p_value <= policy.GUARDS["nll"].level
    rose = exceeds(change, margin) and (shown or len(sums) >= policy.LEAST_FOR_MARGIN)
    fails = rose or not math.isfinite(candidate)
    bound = change - float(special.ndtri(1 - policy.LEVEL)) * error
    numbers = {"candidate": candidate, "champion": champion, "change": change, "bound": bound}
    row = _result(
        "nll",
        tested=fails or math.isfinite(change),
        records=len(sums),
        p_value=p_value,
        margin=margin,
        # JSON has no other numbers.
        **{name: number for name, number in numbers.items() if math.isfinite(number)},
    )
    yield _fail_if(row, fails)


def _degenerate(comparison: Comparison, margin: float) -> Iterator[GuardResult]:
    """
    Yield a result each for empty, truncated and looping answers; a rise beyond the margin fails at p <= .01.

    Costs .3 to .5 points each; rates four times as high as 2 % are promoted in 2 % (98), twice as high on 200 records
    in 68 (93).
    """
    for kind in DEGENERATE if comparison.ids else ():
        yield _tested(_row(kind, (), comparison.by_group(comparison.degenerate[kind]), margin))


def _floors(comparison: Comparison, config: GuardConfig) -> Iterator[GuardResult]:
    """
    Yield a result per floor in the settings; it fails if the mean score is below it, or no record has such a score.

    A floor whose metric applies to a part of the groups only, fewer than `LEAST_TESTED`, is only displayed: `[1]` and
    `{}` are JSON, and one such reference would block every promotion. Costs a candidate 5 points above the floor
    nothing; a candidate truly 2 points below is promoted in 8 % (98).
    """
    for name, floor in sorted(config.floors.items()):
        pair = comparison.pairs(metric=name)
        score = float(pair[:, 0].mean()) * POINTS if len(pair) else None
        few = 0 < len(pair) < min(policy.LEAST_TESTED, len(comparison.pairs()))
        row = _result(
            "floor",
            (METRICS[name].title, floor),
            note="too_few" if few else None,
            tested=bool(comparison.ids) and not few,
            records=len(pair),
            candidate=score,
            change=None if score is None else score - floor,
            margin=0.0,
        )
        yield _fail_if(row, score is None or exceeds(floor, score))


def _judge(comparison: Comparison) -> Iterator[GuardResult]:
    """
    Yield the judge model's preference, if there is a judgement; preferring the champion fails at p <= .05.

    The exact sign test counts groups, each for the model that the judge prefers in more of its records. Costs nothing;
    a winner that loses 120 of 200 decided groups is promoted in 30 % (98).
    """
    if comparison.opinion is None:
        return
    results = map(comparison.opinion.results.get, comparison.ids)
    net = np.bincount(comparison.groups, [{"win": 1, "loss": -1}.get(result or "", 0) for result in results])
    wins, losses = int((net > 0).sum()), int((net < 0).sum())
    row = _result(
        "judge",
        (comparison.opinion.judgement.model,),
        tested=wins + losses >= policy.LEAST_TESTED,
        records=wins + losses,
        candidate=wins,
        champion=losses,
        change=wins - losses,
        p_value=statistics.mcnemar_exact(losses, wins),
    )
    yield _fail_if(row, is_shown(row))


def _tested(row: GuardResult) -> GuardResult:
    return _fail_if(row, is_shown(row) and is_beyond(row))


def _adjusted(rows: Sequence[GuardResult]) -> list[GuardResult]:
    adjusted = iter(statistics.holm([row.p_value for row in rows if row.p_value is not None]))
    return [row if row.p_value is None else row.model_copy(update={"p_value": next(adjusted)}) for row in rows]


def _fail_if(row: GuardResult, fails: bool) -> GuardResult:  # noqa: FBT001
    return row.model_copy(update={"state": "failed"}) if fails and row.state == "passed" else row


def _row(guard: str, about: tuple[str | int, ...], pair: Floats, margin: float) -> GuardResult:
    """Return a passed result with its p-value for a loss, or a shown one without if the groups are too few to test."""
    sign = policy.GUARDS[guard].sign
    changes = (pair[:, 0] - pair[:, 1]) * sign
    tested = changes.size >= (policy.LEAST_EXACT if statistics.is_yes_or_no(changes) else policy.LEAST_TESTED)
    candidate, champion = pair.mean(axis=0) * POINTS
    return _result(
        guard,
        about,
        tested=tested,
        records=changes.size,
        candidate=float(candidate),
        champion=float(champion),
        change=sign * float(changes.mean()) * POINTS,
        bound=sign * statistics.upper_bound(changes) * POINTS,
        p_value=statistics.one_sided_p(-changes) if tested else None,
        margin=margin,
    )


def _result(guard: str, about: tuple[str | int | float, ...] = (), *, tested: bool, **facts: Any) -> GuardResult:
    state = "passed" if tested else "shown"
    return GuardResult(guard=guard, about=about, unit=policy.GUARDS[guard].unit, state=state, **facts)
