"""
Measure the gate with the loop around it: how often luck wins, honest data is held, a bad drop found, and by what rule.

    python bench/gate.py [--months 1000] [--candidates 2000] [--cards 30] [--processes 2]

Each row is a question, asked of the rules of 2026-11-25 (modelled in `gate_world`, or quoted as measured then) and of
those that decide now (`pipeline.decide.verdict.weigh`, with the search of `daemon.queue.suspects`). In brackets 95 %
intervals: Clopper and Pearson's of shares, exact Poisson ones of counts, else normal ones. A row with a bar says
whether it is kept; exit code 1 if one is missed, be it by luck. Exact match on 500 held-out records of five drops, of
which the newest is new, unless a row says otherwise.

Measured (400 months, 1,500 candidates): honest drops are hardly suspended any more (.03 a month, before .7; of thirty
that bring 10 points each none, before 2.5). A drop of -10 is found in 94 of 100 months, before in 85, one that ruins
one old drop in 98, before in 82, at 2.6 runs more a month. Paraphrases in groups of five promote an equal model in 6.5
of 100 months, before in 35; single records in 11.6 (2,500 months). Missed, beside what misses within the interval: the
first drop of the walk ends 8.2 points down, not 6; months with a drop of -10 end with 25.6 points of 29, not 26.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pipeline.artifacts import Judgement
from pipeline.config import GuardConfig
from pipeline.decide.comparison import Comparison, Opinion, count_results
from pipeline.decide.power import smallest_gain
from pipeline.decide.slices import POINTS, Known
from pipeline.decide.verdict import Rules, promotes, weigh

# A script finds only the files beside it, and a test loads this one from elsewhere.
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gate_world import EXACT, FIRST, NEW_KIND_COMES, ROUGE, WALK, Loop, Setup, World

NIGHTS, BAD_NIGHT, CANDIDATES_A_CARD = 30, 5, 40
IN_GROUPS = Setup(group=5)
POWER_SETUPS = {
    "exact match": Setup(),
    "exact match, groups of five": IN_GROUPS,
    "ROUGE-L": Setup(metric=ROUGE),
    "ROUGE-L, 200 groups of five": Setup(metric=ROUGE, sizes=(200,) * 5, group=5),
}
RULES = Rules(known=Known(frozenset(Setup().known)))
#: On each drop's records, in points: what a bad drop of a month does, and what one that hurts the first drop does.
BAD = {"none": None, "everywhere": (-10.0,) * 5, "one old drop": (-25.0, 0.0, 0.0, 0.0, 0.0)}
#: Two drops that are harmless alone, and what they cost together, on all records.
PAIR, TOGETHER = frozenset((FIRST + BAD_NIGHT, FIRST + BAD_NIGHT + 1)), -15.0
ONE_OLD_LOST = (-10.0, 15.0, 15.0, 15.0, 15.0)


@dataclass(frozen=True)
class Month:
    """How a month ended."""

    gain: float
    honest_suspended: int
    bad_suspended: bool
    extra: float


def equal_month(setup: Setup, seed: int, *, old: bool = False) -> bool:
    """Return whether thirty nights of challengers that are exactly as good promote any."""
    loop = Loop(World.made(setup, seed), {}, old=old)
    for night in range(NIGHTS):
        loop.night(FIRST + night)
    return loop.promotions > 0


def honest_month(seed: int, *, old: bool = False) -> int:
    """Return how many of thirty honest drops are suspended, each of which brings today's champion 10 points."""
    suspended = 0
    for night in range(NIGHTS):
        loop = Loop(World.made(Setup(), seed * NIGHTS + night), {FIRST: np.full(5, 10.0)}, old=old)
        loop.night(FIRST)
        suspended += len(loop.suspended)
    return suspended


def month(bad: str, seed: int, *, old: bool = False) -> Month:
    """Return how a month of honest drops ends that bring a point each, with a bad one in the fifth night."""
    effects = {FIRST + night: np.ones(5) for night in range(1, NIGHTS + 1)}
    culprit = FIRST + BAD_NIGHT if BAD[bad] else 0
    if BAD[bad]:
        effects[culprit] = np.array(BAD[bad])
    loop = Loop(World.made(Setup(), seed), effects, old=old)
    for night in range(1, NIGHTS + 1):
        loop.night(FIRST + night)
    gain, honest = float(loop.truth().mean()), loop.suspended - {culprit}
    return Month(gain, len(honest), culprit in loop.suspended, float(loop.extra_runs()))


def pair_month(seed: int, *, old: bool = False) -> Month:
    """Return how a month of honest drops ends that bring a point each, with two that do harm together only."""
    effects = {FIRST + night: np.ones(5) for night in range(1, NIGHTS + 1)} | {drop: np.zeros(5) for drop in PAIR}
    loop = Loop(World.made(Setup(), seed), effects, old=old, together={PAIR: TOGETHER})
    for night in range(1, NIGHTS + 1):
        loop.night(FIRST + night)
    gain, found = float(loop.truth().mean()), loop.suspended & PAIR
    return Month(gain, len(loop.suspended - PAIR), bool(found), float(loop.extra_runs()))


def idle_month(seeds: float, seed: int, *, old: bool = False) -> int:
    """Return how many of thirty drops that teach nothing are suspended, if trainings differ by so many points."""
    loop = Loop(World.made(Setup(), seed), {}, old=old, seeds=seeds)
    for night in range(NIGHTS):
        loop.night(FIRST + night)
    return len(loop.suspended)


def new_kind(metric: str, loss: float, former: int, seed: int, *, old: bool = False) -> bool:
    """
    Return whether a drop of a new kind is promoted, +70 points on its own records, that costs the old drop some.

    The anchor holds it against so many former champions, all as good on the old drop as today's.
    """
    setup = Setup(metric, NEW_KIND_COMES.sizes, NEW_KIND_COMES.known, NEW_KIND_COMES.new_kinds)
    loop = Loop(World.made(setup, seed), {1: np.array((-loss, 70.0))}, old=old)
    loop.former += [loop.world.answers().scores for _ in range(former)]
    loop.night(1)
    return loop.promotions > 0


def walk(seed: int, *, old: bool = False) -> tuple[float, float]:
    """Return how far down the first drop is after ten drops of new kinds, and how many were learned."""
    effects = {drop: np.eye(11)[drop] * 70 - np.eye(11)[0] * 3 for drop in range(1, 11)}
    loop = Loop(World.made(WALK, seed), effects, old=old)
    for drop in range(1, 11):
        loop.night(drop)
    return -float(loop.truth()[0]), float(len(loop.known) - 1)


def one_old_lost(seed: int, *, old: bool = False) -> tuple[bool, bool]:
    """Return whether a winner that truly lost 10 points on one old drop is promoted at once, and with its trial."""
    loop = Loop(World.made(Setup(), seed), {FIRST: np.array(ONE_OLD_LOST)}, old=old)
    loop.night(FIRST)
    return loop.promotions > 0 and not loop.trials, loop.promotions > 0


def first_run(loss: float, seed: int, *, old: bool = False) -> bool:
    """Return whether the first drops are suspended: +20 points against the base, general abilities truly lost."""
    loop = Loop(World.made(Setup(known=()), seed), {FIRST: np.full(5, 20.0)}, old=old, harm={"general": loss})
    loop.night(FIRST)
    return bool(loop.suspended)


def card(setup: Setup, seed: int, candidates: int = CANDIDATES_A_CARD) -> list[bool]:
    """Return which candidates are promoted whose true gain is the smallest that an equal challenger's card states."""
    world = World.made(setup, seed)

    def beside(points: float) -> Comparison:
        champion = world.answers()
        return world.side_by_side(world.answers(points), champion, champion.general)

    stated = smallest_gain(beside(0.0), lambda drawn: promotes(drawn, RULES), seed)
    if stated is None:
        raise SystemExit("a card says that it can show no gain")
    return [promotes(beside(stated * POINTS), RULES) for _ in range(candidates)]


# --- what each guard costs and buys

#: How bad a winner (+10 points) is, by the guard that is to stop it, and in what words.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "slice": ("an old drop -10", {"points": ONE_OLD_LOST}),
    "general": ("general -10", {"harm": {"general": 10}}),
    "general_base": ("-8 and again -6 since the base", {"harm": {"general": 14}, "champion": {"general": 8}}),
    "anchor": ("an old drop -6 and again -4", {"points": (-4.0, *(13.5,) * 4), "former": (6.0, 0.0, 0.0, 0.0, 0.0)}),
    "nll": ("+.15 nats per token", {"harm": {"nll": 0.15}}),
    **{kind: (f"{kind} four times", {"harm": {kind: 4.0}}) for kind in ("empty", "truncated", "looping")},
    "floor": ("2 points below it", {"f1": 0.58}),
    "judge": ("prefers the champion 3:2", {"preferred": (0.24, 0.36)}),
}
JUDGED = 200
GUARDED = Rules(guards=GuardConfig(floors={"token_f1": 60.0}), known=RULES.known)
#: What `bench/gate.py` and the audit of 2026-11-25 measured of the rules of that day: cost, with it, without it.
OLD_GUARDS = {
    "slice": "0.5; 20 (92)",
    "general": "7 to 8; 13 (54)",
    "general_base": "0 to 1",
    "nll": "0.0; 49 (93)",
    "empty": "0.2",
    "truncated": "0.2",
    "looping": "0.2",
}


def winner(guard: str, seed: int) -> tuple[bool, frozenset[str]]:
    """Return whether a candidate of +10 points wins, honest or bad for this guard, and the guards that it failed."""
    case: dict[str, Any] = CASES[guard][1] if guard else {}
    world = World.made(Setup(), seed)
    base, former = world.answers().general, world.answers(np.array(case.get("former", 0.0))).scores
    champion = world.answers(harm=case.get("champion"))
    candidate = world.answers(np.array(case.get("points", 10.0)), case.get("harm"))
    comparison = world.side_by_side(candidate, champion, base, (former,))
    level = np.array((case.get("f1", 0.65), 0.65))
    scores = {**comparison.scores, "token_f1": world.random.normal(level, 0.3, (world.drops.size, 2))}
    won, lost = case.get("preferred", (0.36, 0.24))
    said = world.random.choice(("win", "loss", "tie"), JUDGED, p=(won, lost, 1 - won - lost)).tolist()
    judgement = Judgement(folder="", model="a judge", **count_results(said))
    opinion = Opinion(judgement, dict(zip(world.ids, said, strict=False)))
    found = weigh(replace(comparison, scores=scores, opinion=opinion), GUARDED)
    wins = not {"p_above_limit", "gain_below_minimum"} & set(found.reasons)
    return wins, frozenset(row.guard for row in found.guards if row.state == "failed")


def print_guards(pool: ProcessPoolExecutor, candidates: int) -> None:
    """Print what each guard costs a good candidate and what it buys. Raises `SystemExit` for a rule without a row."""
    missing = set(GuardConfig().stop) ^ set(CASES)
    if missing:
        raise SystemExit(f"no row, or no rule, for {', '.join(sorted(missing))}")
    honest = list(pool.map(partial(winner, ""), range(candidates), chunksize=20))
    promoted = np.array([wins and not failed for wins, failed in honest])
    print(f"\nWhat each guard costs and buys; an honest +10 is promoted in {measured(promoted)}")
    head = f"{'guard':<14}{'points of promotion it costs':<30}{'a truly bad winner':<34}{'promoted with it':<22}"
    print(f"{head}{'without it':<22}2026-11-25: cost; with (without)")
    for guard, (words, _) in CASES.items():
        bad = list(pool.map(partial(winner, guard), range(10**6, 10**6 + candidates // 2), chunksize=20))
        cost = np.array([wins and failed == {guard} for wins, failed in honest])
        kept = np.array([wins and not failed for wins, failed in bad])
        free = np.array([wins and failed <= {guard} for wins, failed in bad])
        columns = f"{measured(cost):<30}{words:<34}{measured(kept):<22}{measured(free):<22}"
        print(f"{guard:<14}{columns}{OLD_GUARDS.get(guard, '-')}", flush=True)


# --- rows, intervals and bars


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """
    Return a mean with its 95 % interval.

    Of yes and no it is a share in per cent (Clopper and Pearson 1934), of whole numbers a mean count (Garwood 1936).
    """
    mean, size, total = float(values.mean()), values.size, int(values.sum())
    if values.dtype == np.bool_:
        ends = stats.binomtest(total, size).proportion_ci(0.95)
        return 100 * mean, 100 * float(ends.low), 100 * float(ends.high)
    if values.dtype == np.int64:
        low = float(stats.chi2.ppf(0.025, 2 * total)) / 2 / size if total else 0.0
        return mean, low, float(stats.chi2.ppf(0.975, 2 * total + 2)) / 2 / size
    error = 1.96 * float(values.std(ddof=1)) / math.sqrt(size)
    return mean, mean - error, mean + error


def measured(values: np.ndarray) -> str:
    """Return a mean with its interval, in words."""
    digits, unit = 3 if values.dtype == np.int64 else 1, " %" if values.dtype == np.bool_ else ""
    mean, low, high = (f"{value:.{digits}f}" for value in interval(values))
    return f"{mean} [{low}-{high}]{unit}"


@dataclass(frozen=True)
class Row:
    """A question, with both answers and a bar: the new one's mean lies between `least` and `most`."""

    words: str
    old: np.ndarray | str
    new: np.ndarray
    least: float = -np.inf
    most: float = np.inf

    def kept(self) -> bool:
        """Return whether the bar is kept; without one, it is."""
        return self.least <= interval(self.new)[0] <= self.most

    def line(self) -> str:
        """Return the row as it is printed."""
        ends = [end for end in (self.least, self.most) if np.isfinite(end)]
        sign = "" if len(ends) != 1 else ">= " if np.isfinite(self.least) else "<= "
        bar = sign + " to ".join(f"{end:g}" for end in ends)
        _, low, high = interval(self.new)
        near = high >= self.least and low <= self.most
        said = "kept" if self.kept() else "MISSED, within the interval" if near else "MISSED"
        old = self.old if isinstance(self.old, str) else measured(self.old)
        return f"{self.words:<74}{old:<24}{measured(self.new):<24}{f'{bar:<10}{said}' if ends else ''}".rstrip()


@dataclass(frozen=True)
class Counts:
    """How much is simulated, and by whom."""

    pool: ProcessPoolExecutor
    months: int
    candidates: int
    cards: int
    columns: tuple[bool, bool] = field(default=(True, False))

    def both(self, ask: Callable[..., Any], count: int) -> list[Any]:
        """Return what the old rules and the new ones made of so many seeds."""
        return [np.array(list(self.pool.map(partial(ask, old=old), range(count), chunksize=5))) for old in self.columns]


def luck_rows(counts: Counts) -> Iterator[Row]:
    """Yield false promotions."""
    setups = {"exact match": (Setup(), 12), "ROUGE-L": (Setup(metric=ROUGE), 17), "groups of five": (IN_GROUPS, 13)}
    for words, (setup, most) in setups.items():
        old, new = counts.both(partial(equal_month, setup), counts.months)
        yield Row(f"thirty equal nights, any promotion: {words}", old, new, most=most)


def candidate_rows(counts: Counts) -> Iterator[Row]:
    """Yield single candidates: honest, of a new kind, bad on one old drop, the first."""
    old, new = counts.both(honest_month, max(counts.candidates // NIGHTS, 20))
    yield Row("thirty nights of an honest +10: honest drops suspended in the end", old, new, most=0.05)
    for metric, words in ((EXACT, "exact match"), (ROUGE, "ROUGE-L")):
        for loss, least in ((0, 96), (2, 90)):
            old, new = counts.both(partial(new_kind, metric, loss, 0), counts.candidates)
            bar = least if metric == EXACT else -np.inf
            yield Row(f"a new kind comes, an old drop of 150 truly -{loss}: promoted, {words}", old, new, least=bar)
    old, new = counts.both(partial(new_kind, EXACT, 0, 3), counts.candidates)
    yield Row("  truly -0, and three former champions to be held against: promoted", old, new)
    old, new = counts.both(one_old_lost, counts.candidates)
    yield Row("a winner (+10) that truly lost 10 on one old drop: promoted at once", old[:, 0], new[:, 0], most=20)
    yield Row("  the same, with the search's trial", old[:, 1], new[:, 1])
    old, new = counts.both(partial(first_run, 2), counts.candidates // 4)
    yield Row("first run, +20 against the base, general truly -2: all data suspended", old, new)


def month_rows(counts: Counts) -> Iterator[Row]:
    """Yield months of honest drops, with a bad one in the fifth night."""
    words = {"none": "honest +1 a night", "everywhere": "a -10 drop in night 5", "one old drop": "-25 on one old drop"}
    for bad, said in words.items():
        columns = counts.both(partial(month, bad), counts.months)
        if bad != "none":
            yield Row(f"month, {said}: the bad drop suspended", *_of(columns, "bad_suspended", np.bool_), least=95)
        yield Row(f"month, {said}: honest drops suspended", *_of(columns, "honest_suspended", np.int64), most=0.05)
        yield Row(f"month, {said}: true gain at the end", *_of(columns, "gain", np.float64), least=26)
        yield Row(f"month, {said}: extra runs", *_of(columns, "extra", np.float64), most=3)

    columns = counts.both(pair_month, counts.months)
    pair = "month, two drops that cost 15 points together only"
    yield Row(f"{pair}: one of them suspended", *_of(columns, "bad_suspended", np.bool_))
    yield Row(f"{pair}: true gain at the end", *_of(columns, "gain", np.float64), least=24)
    yield Row(f"{pair}: extra runs", *_of(columns, "extra", np.float64), most=4)
    for seeds, most in ((0.0, 0.1), (2.0, 0.35)):
        old, new = counts.both(partial(idle_month, seeds), counts.months)
        idle = f"month of drops that teach nothing, seeds differ by {seeds:g} points"
        yield Row(f"{idle}: suspended", old, new, most=most)


def _of(columns: Sequence[Sequence[Month]], name: str, kind: type) -> tuple[np.ndarray, np.ndarray]:
    found: list[np.ndarray] = [np.array([getattr(one, name) for one in months], dtype=kind) for months in columns]
    return found[0], found[1]


def walk_rows(counts: Counts) -> Iterator[Row]:
    """Yield the walk away from the first drop."""
    old, new = counts.both(walk, counts.months)
    yield Row("ten new kinds, each truly -3 on the first drop: it ends so far down", old[:, 0], new[:, 0], most=6)
    yield Row("  and so many were learned", old[:, 1], new[:, 1])


def power_rows(counts: Counts) -> Iterator[Row]:
    """Yield the true power at the gain that a card states as shown in eight of ten cases."""
    quoted = ("87 to 91 %, quoted", "-", "61 to 69 %, quoted", "-")
    for (words, setup), old in zip(POWER_SETUPS.items(), quoted, strict=True):
        found = counts.pool.map(partial(card, setup), range(counts.cards))
        power = np.concatenate(list(found))
        yield Row(f"true power at a card's smallest gain: {words}", old, power, least=75, most=85)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--months", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--cards", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    missed = []
    print(f"{'':<74}{'rules of 2026-11-25':<24}{'now':<24}bar")
    with ProcessPoolExecutor(options.processes) as pool:
        counts = Counts(pool, options.months, options.candidates, options.cards)
        for rows in (luck_rows, candidate_rows, month_rows, walk_rows, power_rows):
            for row in rows(counts):
                print(row.line(), flush=True)
                missed += [] if row.kept() else [row.words]
        print_guards(pool, options.candidates)
    print("\nbars:", f"MISSED: {'; '.join(missed)}" if missed else "all kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
