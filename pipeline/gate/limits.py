"""Guards with a margin, a count or a limit: loss since the base model, likelihood, bad answers, floors and costs."""

import math
from collections.abc import Iterator

import numpy as np
from scipy import special

from pipeline.artifacts import GuardResult
from pipeline.config import GuardConfig
from pipeline.gate import statistics
from pipeline.gate.comparison import DEGENERATE, Comparison, Suite
from pipeline.gate.power import GUARD_LEVEL, Watched
from pipeline.gate.slices import LEAST_TESTED, POINTS
from pipeline.gate.statistics import Floats
from pipeline.metrics.registry import METRICS

#: A loss beyond its margin counts by itself on so many records; on fewer, if the test shows it as well.
LEAST_FOR_MARGIN = 100
#: A slower model fails only if an answer takes so much longer: a few milliseconds more are nobody's harm.
LEAST_SECONDS = 0.5
_MEGABYTE = 1e6
_NORMAL_95 = 1.6448536269514722


def point_guards(comparison: Comparison, config: GuardConfig, seed: int) -> Iterator[GuardResult]:
    """Yield the results."""
    for suite in comparison.suites:
        if suite.base is not None or comparison.held_to_base:
            yield _against_base(suite, config.general_base, seed)
    yield from _floors(comparison, config)
    if comparison.ids:
        yield _likelihood(comparison, config)
        for kind in DEGENERATE:
            if kind in comparison.degenerate:
                yield _rate(kind, comparison.degenerate[kind], config.degenerate)
        if METRICS[comparison.metric].continuous:
            yield _catastrophes(comparison)
    yield from _costs(comparison, config)
    if comparison.opinion is not None:
        judged = comparison.opinion.on(comparison.ids)
        yield _judge(judged.wins, judged.losses, judged.model)


def watched_points(comparison: Comparison, config: GuardConfig) -> Iterator[Watched]:
    """Yield what these guards would ask of a good candidate, one that changes none of it; costs are not noise."""
    if "general_base" not in config.show_only:
        yield from _watched_base(comparison, config.general_base / POINTS)
    if comparison.nll is not None and "nll" not in config.show_only:
        parts = statistics.ratio_parts(*comparison.nll)
        if np.isfinite(parts).all():
            yield Watched("nll", -parts, tested=False, margin=config.nll)
    for kind, pair in comparison.degenerate.items():
        if kind not in config.show_only:
            rises = pair[:, 0] - pair[:, 1]
            parts = (rises - rises.mean()) / rises.size
            yield Watched(kind, -parts, tested=False, margin=config.degenerate / POINTS)
    continuous, enough = METRICS[comparison.metric].continuous, len(comparison.ids) >= LEAST_TESTED
    if continuous and enough and "catastrophe" not in config.show_only:
        yield Watched("catastrophe", 0.0, tested=False, catastrophes=True)


def _fails(change: float, margin: float, records: int, p_value: float | None) -> bool:
    """Return whether a rise is beyond its margin, and there are enough records or proof enough to say so."""
    shown = records >= LEAST_TESTED and p_value is not None and p_value <= GUARD_LEVEL
    return change > margin + 1e-9 and (records >= LEAST_FOR_MARGIN or shown)


def _against_base(suite: Suite, margin: float, seed: int) -> GuardResult:
    """
    Return the guard on what a line of champions lost of a suite since the base model.

    Each of them may lose a little against the one before it, and nothing would ever stop them together. That a loss is
    shown is not enough: a champion may have had it already, and every candidate would pay for it again. Nor does one
    fail that is no further step down: where the champion is beyond the margin already, what wins may bring some back.
    """
    label = f"{suite.name} against the base model"
    candidate = float(suite.scores[:, 0].mean()) * POINTS
    if suite.base is None:
        return GuardResult(
            guard="general_base",
            label=f"{label}, which was not measured",
            unit="points",
            records=len(suite.scores),
            candidate=candidate,
            margin=margin,
            state="shown",
        )
    falls = suite.base - suite.scores[:, 0]
    yes_or_no = statistics.is_yes_or_no(falls)
    p_value = statistics.one_sided_p(falls, continuous=not yes_or_no, seed=seed, relevant=GUARD_LEVEL)
    beyond = _fails(float(falls.mean()) * POINTS, margin, falls.size, p_value)
    fails = beyond and candidate < float(suite.scores[:, 1].mean()) * POINTS - 1e-9
    return GuardResult(
        guard="general_base",
        label=f"{label}, no further below it than the champion" if beyond and not fails else label,
        unit="points",
        records=falls.size,
        candidate=candidate,
        champion=float(suite.base.mean()) * POINTS,
        change=-float(falls.mean()) * POINTS,
        bound=statistics.upper_bound(-falls) * POINTS,
        p_value=p_value,
        margin=margin,
        state="failed" if fails else "passed" if falls.size >= LEAST_TESTED else "shown",
    )


def _watched_base(comparison: Comparison, margin: float) -> Iterator[Watched]:
    """
    Yield what the guards against the base model leave a good candidate: what today's champion has not lost yet.

    Where it has lost all of it, what falls below the champion fails, and nothing else.
    """
    for suite in comparison.suites:
        if suite.base is None or len(suite.base) < LEAST_TESTED:
            continue
        falls = suite.base - suite.scores[:, 0]
        root = math.sqrt(falls.size)
        room = margin if falls.size >= LEAST_FOR_MARGIN else max(margin, _NORMAL_95 * float(falls.std()) / root)
        lost = float((suite.base - suite.scores[:, 1]).mean())
        # The items are the same every night: what is left to luck is how this candidate differs from the champion.
        changes = suite.scores[:, 0] - suite.scores[:, 1]
        # Of whole items one is the least that can be lost: it is called so from half of it on.
        least = 0.5 / changes.size if statistics.is_yes_or_no(changes) else 0.0
        error = float(changes.std()) / root
        yield Watched("general_base", error, tested=False, margin=max(least, room - lost))


def _likelihood(comparison: Comparison, config: GuardConfig) -> GuardResult:
    """Return the guard on the references' negative log-likelihood, weighted by tokens."""
    records = len(comparison.ids)
    candidate, champion = comparison.mean_nll
    change, error = candidate - champion, math.nan
    if comparison.nll is not None:
        sums, tokens = comparison.nll
        candidate, champion = (sums.sum(axis=0) / tokens.sum(axis=0)).tolist()
        change, error = statistics.ratio_change(sums, tokens)
    p_value = float(special.ndtr(-change / error)) if error > 0 else None
    broken = not math.isfinite(candidate)
    fails = broken or _fails(change, config.nll, records, p_value)
    return GuardResult(
        guard="nll",
        label="negative log-likelihood of the references",
        unit="nats",
        records=records,
        candidate=_number(candidate),
        champion=_number(champion),
        change=_number(change),
        bound=_number(change - _NORMAL_95 * error),
        p_value=p_value,
        margin=config.nll,
        state="failed" if fails else "passed" if math.isfinite(change) else "shown",
    )


def _rate(kind: str, pair: Floats, margin: float) -> GuardResult:
    """Return the guard on one kind of degenerate answers; its test is McNemar's on who gives them."""
    falls = pair[:, 1] - pair[:, 0]
    candidate, champion = (pair.mean(axis=0) * POINTS).tolist()
    p_value = statistics.mcnemar_exact(int(np.count_nonzero(falls < 0)), int(np.count_nonzero(falls > 0)))
    fails = _fails(candidate - champion, margin, falls.size, p_value)
    return GuardResult(
        guard=kind,
        label=f"{kind} answers",
        unit="per cent",
        records=falls.size,
        candidate=candidate,
        champion=champion,
        change=candidate - champion,
        bound=-statistics.upper_bound(falls) * POINTS,
        p_value=p_value,
        margin=margin,
        state="failed" if fails else "passed" if falls.size >= LEAST_TESTED else "shown",
    )


def _catastrophes(comparison: Comparison) -> GuardResult:
    """Return the guard on answers that fell by half of the scale or more, against those that rose as much."""
    lost, gained, p_value = statistics.catastrophes(comparison.differences())
    return GuardResult(
        guard="catastrophe",
        label="answers that lost 50 points or more, beside those that gained as much",
        unit="records",
        records=len(comparison.ids),
        candidate=lost,
        champion=gained,
        change=gained - lost,
        p_value=p_value,
        state="shown" if len(comparison.ids) < LEAST_TESTED else "failed" if p_value <= GUARD_LEVEL else "passed",
    )


def _floors(comparison: Comparison, config: GuardConfig) -> Iterator[GuardResult]:
    """
    Yield the floors; one that no judged record has a score for fails, as nothing shows that it is reached.

    One of a metric that says something about a few of the records only is shown: those may be few by chance.
    """
    for name, floor in sorted(config.floors.items()):
        pair = comparison.pair(name)
        score = float(pair[:, 0].mean()) * POINTS if len(pair) else None
        below = score is None or score < floor - 1e-9
        few = name in comparison.partial and 0 < len(pair) < LEAST_TESTED
        label = f"{METRICS[name].title}, at least {floor:g}"
        yield GuardResult(
            guard="floor",
            label=f"{label}, on too few records to decide" if few else label,
            unit="points",
            records=len(pair),
            candidate=score,
            change=None if score is None else score - floor,
            margin=0.0,
            state="shown" if few or not comparison.ids else "failed" if below else "passed",
        )


def _costs(comparison: Comparison, config: GuardConfig) -> Iterator[GuardResult]:
    seconds, champion_seconds = comparison.seconds_per_answer
    if seconds is not None and champion_seconds:
        much = seconds - champion_seconds >= LEAST_SECONDS
        yield _multiple(("latency", "seconds an answer"), (seconds, champion_seconds), config.latency, matters=much)
    size, champion_size = comparison.size_bytes
    if size and champion_size:
        megabytes = (size / _MEGABYTE, champion_size / _MEGABYTE)
        yield _multiple(("size", "size of the model's folder, MB"), megabytes, config.size, matters=True)


def _multiple(name: tuple[str, str], values: tuple[float, float], margin: float, *, matters: bool) -> GuardResult:
    ratio = values[0] / values[1]
    return GuardResult(
        guard=name[0],
        label=name[1],
        unit="times",
        candidate=values[0],
        champion=values[1],
        change=ratio,
        margin=margin,
        state="failed" if matters and ratio > margin + 1e-9 else "passed",
    )


def _judge(wins: int, losses: int, model: str) -> GuardResult:
    """Return the guard on a language model's opinion: the exact sign test on the pairs that it decided."""
    p_value = statistics.mcnemar_exact(losses, wins)
    enough = wins + losses >= LEAST_TESTED
    return GuardResult(
        guard="judge",
        label=f"answers that {model} prefers",
        unit="records",
        records=wins + losses,
        candidate=wins,
        champion=losses,
        change=wins - losses,
        p_value=p_value,
        state="shown" if not enough else "failed" if p_value <= GUARD_LEVEL else "passed",
    )


def _number(value: float) -> float | None:
    """Return a number that JSON can write."""
    return value if math.isfinite(value) else None
