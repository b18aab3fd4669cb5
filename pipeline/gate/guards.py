"""
Guards: what a candidate that wins must not lose.

A guard fails where harm is shown, not where its absence is unproven: measured, five slices under "the lower bound must
be above -5 points" let only 38 of 100 good candidates pass, of which 78 won. Shown is a one-sided test at 5 %, all
guards of one kind together (Holm 1979), or a loss beyond the margin on at least `LEAST_FOR_MARGIN` records. On fewer
than `LEAST_TESTED` records nothing is tested, only displayed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.artifacts import GuardResult
from pipeline.config import GuardConfig, GuardName
from pipeline.gate import statistics
from pipeline.gate.comparison import Comparison, Places
from pipeline.gate.limits import LEAST_FOR_MARGIN, point_guards, watched_points
from pipeline.gate.power import GUARD_LEVEL, Watched
from pipeline.gate.slices import LEAST_TESTED, POINTS, Slice
from pipeline.gate.statistics import Floats
from pipeline.metrics.registry import METRICS


@dataclass(frozen=True)
class Guards:
    """What the guards of a report say."""

    rows: tuple[GuardResult, ...]
    seen_lost: tuple[str, ...]
    """Labels of the slices of seen records that lost, whether or not the settings let a slice fail."""

    @property
    def failed(self) -> tuple[GuardResult, ...]:
        """The guards that stand against promotion."""
        return tuple(row for row in self.rows if row.state == "failed")


@dataclass(frozen=True)
class _Subject:
    """One paired change that is tested: `pair` has the shape (records, 2), 0 to 1; harm is a negative difference."""

    guard: GuardName
    family: str
    label: str
    pair: Floats
    differences: Floats
    margin: float
    """Points."""
    places: Places | None = None
    """Places of its records among the held-out ones; none: it has records of its own."""
    part: Slice | None = None


def check(comparison: Comparison, slices: Sequence[Slice], config: GuardConfig, seed: int) -> Guards:
    """Return every guard's result on the compared records."""
    rows, lost = [], []
    # A former champion may have answered none of the records that are judged on.
    subjects = [subject for subject in _subjects(comparison, slices, config) if subject.differences.size]
    for family in dict.fromkeys(subject.family for subject in subjects):
        members = [subject for subject in subjects if subject.family == family]
        results = _test(members, seed)
        lost += [
            row.label
            for member, row in zip(members, results, strict=True)
            if member.part is not None and member.part.seen and row.state == "failed"
        ]
        rows += [_worst_former(results)] if family == "former" else results
    rows += point_guards(comparison, config, seed)
    show = frozenset(config.show_only)
    shown = [row.model_copy(update={"state": "shown"}) if row.guard in show else row for row in rows]
    return Guards(tuple(shown), tuple(lost))


def watched(comparison: Comparison, slices: Sequence[Slice], config: GuardConfig) -> tuple[Watched, ...]:
    """
    Return what the guards would ask of a good candidate with the noise of these records, for the whole power.

    Good is: the same gain on every slice and against every former champion, other metrics moved as this report's
    differences move with the primary one's (least squares) but none down, nothing else changed.
    """
    gains = comparison.differences()
    found = []
    for subject in _subjects(comparison, slices, config):
        own = subject.differences
        if subject.guard in config.show_only or own.size < LEAST_TESTED:
            continue
        slope = {"metric": 0.0, "general": 0.0}.get(subject.guard, 1.0)
        if subject.guard == "metric":
            slope = max(0.0, _slope(own, gains[subject.places]))
        errors = (own - own.mean()) / own.size
        parts: Floats | float = float(np.sqrt((errors**2).sum()))
        if subject.places is not None:
            parts = np.zeros(gains.size)
            parts[subject.places] = errors
        margin = subject.margin / POINTS if own.size >= LEAST_FOR_MARGIN else None
        found.append(Watched(subject.family, parts, slope=slope, margin=margin))
    return (*found, *watched_points(comparison, config))


def _slope(own: Floats, gains: Floats) -> float:
    """Return how `own` differences move with the primary metric's on the same records, by least squares."""
    # Of records that are a part of the whole, the mean is their own.
    centred = gains - gains.mean()
    total = float((centred**2).sum())
    return float(own @ centred) / total if total > 0 else 0.0


def _subjects(comparison: Comparison, slices: Sequence[Slice], config: GuardConfig) -> Iterator[_Subject]:
    everywhere = np.arange(len(comparison.ids))
    for name in (*comparison.scores, *comparison.partial) if len(comparison.ids) else ():
        if name != comparison.metric:
            title = METRICS[name].title if name in METRICS else name
            pair, own = comparison.pair(name), comparison.differences(name)
            places = comparison.partial[name].places if name in comparison.partial else everywhere
            yield _Subject("metric", "metric", title, pair, own, config.metrics, places)
    primary, gains = comparison.scores[comparison.metric], comparison.differences()
    for one in slices:
        # New records are guarded drop by drop; together they are what may carry a win, not what could be lost.
        if one.kind != "unseen":
            places = np.flatnonzero(one.mask)
            yield _Subject("slice", f"slice {one.kind}", one.label, primary[places], gains[places], config.slices,
                           places, one)  # fmt: skip
    for suite in comparison.suites:
        changes = suite.scores[:, 0] - suite.scores[:, 1]
        yield _Subject("general", "general", suite.name, suite.scores, changes, config.general)
    for former in comparison.former:
        pair = np.column_stack((primary[former.places, 0], former.scores))
        sign = 1 if METRICS[comparison.metric].higher_is_better else -1
        label = f"champion of generation {former.generation}"
        yield _Subject("former", "former", label, pair, sign * (pair[:, 0] - pair[:, 1]), config.former, former.places)


def _test(members: Sequence[_Subject], seed: int) -> list[GuardResult]:
    """Return the results of one kind of guard, whose tests share the level."""
    tested = [member for member in members if member.differences.size >= LEAST_TESTED]
    raw = [
        statistics.one_sided_p(
            -member.differences,
            continuous=not statistics.is_yes_or_no(member.differences),
            seed=seed,
            relevant=GUARD_LEVEL,
            # Holm multiplies by their number: even the largest must still be able to show what `worse` asks for.
            tests=len(tested),
        )
        for member in tested
    ]
    adjusted = {id(member): p_value for member, p_value in zip(tested, statistics.holm(raw), strict=True)}
    return [_result(member, adjusted.get(id(member))) for member in members]


def _result(member: _Subject, p_value: float | None) -> GuardResult:
    own = member.differences
    change = float(own.mean()) * POINTS
    candidate, champion = member.pair.mean(axis=0) * POINTS
    beyond = own.size >= LEAST_FOR_MARGIN and change < -member.margin - 1e-9
    fails = p_value is not None and (p_value <= GUARD_LEVEL or beyond)
    return GuardResult(
        guard=member.guard,
        label=member.label,
        unit="points",
        records=own.size,
        candidate=float(candidate),
        champion=float(champion),
        change=change,
        bound=statistics.upper_bound(own) * POINTS,
        p_value=p_value,
        margin=member.margin,
        state="shown" if p_value is None else "failed" if fails else "passed",
    )


def _worst_former(results: Iterable[GuardResult]) -> GuardResult:
    """Return the former champion that the candidate does worst against; those on too few records go last."""
    return min(results, key=lambda row: (row.state == "shown", row.state != "failed", row.change))
