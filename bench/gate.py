"""
Measure the gate with the loop around it: how often luck wins, honest data is suspended, and a bad drop found.

    python bench/gate.py [--months 400] [--candidates 1500] [--cards 25] [--processes 2]

Each row is a question about the gate (`pipeline.decide.verdict.weigh`), the search of `daemon.queue.suspects` and
`daemon.queue.leave_one_out`. In brackets 95 % intervals: Clopper and Pearson's of shares, exact Poisson intervals of
counts, else normal ones. A row with a bar says whether it is kept; exit code 1 if any is missed, even by luck. Exact
match on 500 held-out records of five drops, of which the newest is new, unless a row says otherwise.

docs/gate.md has what was measured, with the bars that are missed.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from bench.gate_world import FIRST, NEW_KIND_COMES, ROUGE, WALK, Loop, Setup, World

NIGHTS, BAD_NIGHT, CANDIDATES_A_CARD = 30, 5, 40
#: The share of answers that lose everything.
RARE = 0.012
IN_GROUPS = Setup(group=5)
POWER_SETUPS = {
    "exact match": Setup(),
    "ROUGE-L": Setup(metric=ROUGE),
    "groups of five that gain as a whole": IN_GROUPS,
    "groups of five, each record gains by itself": replace(IN_GROUPS, spread=True),
}
FOUR_OLD = Setup(sizes=(150,) * 4 + (100,), new_kinds=(4,))
#: Records, the true loss on the old drops, former champions as good as today's, and the bars of the first and the third
#: night.
NEW_KINDS = {
    "150 old truly unchanged": (NEW_KIND_COMES, 0, 0, 95, 97),
    "150 old truly -2": (NEW_KIND_COMES, 2, 0, 90, -np.inf),
    "425 old truly -2": (Setup(sizes=(425, 75), known=(0,), new_kinds=(1,)), 2, 0, 90, -np.inf),
    "150 old truly unchanged, three former champions": (NEW_KIND_COMES, 0, 3, 95, 97),
    "four old drops of 150 truly unchanged": (FOUR_OLD, 0, 0, 88, 97),
    "four old drops of 150 and three former champions": (FOUR_OLD, 0, 3, 80, 97),
}
RULES = Rules(known=Known(frozenset(Setup().known)))
#: On each drop's records, in points: what a bad drop of a month does, and what one that hurts the first drop does.
BAD = {
    "none": None,
    "everywhere": (-10.0,) * 5,
    "one old drop": (-25.0, 0.0, 0.0, 0.0, 0.0),
    "less": (-15.0, 0.0, 0.0, 0.0, 0.0),
    "likelihood": (0.0,) * 5,
}
#: By how many nats per token the drop of this name makes the references less likely.
LESS_LIKELY = 0.2
#: Two drops that are harmless alone, and what they cost together, on all records.
PAIR, TOGETHER = frozenset((FIRST + BAD_NIGHT, FIRST + BAD_NIGHT + 1)), -15.0
BAD_WORDS = {
    "none": "honest +1 a night",
    "everywhere": "a -10 drop in night 5",
    "one old drop": "-25 on one old drop",
    "less": "-15 on one old drop",
    "likelihood": f"+{LESS_LIKELY:g} nats per token and nothing else",
}
FOUND = {"everywhere": 95, "one old drop": 95}
BARRED = ("none", *FOUND)
LEAST_GAIN, MOST_RUNS = {**dict.fromkeys(BARRED, 26.0), "pair": 24.0}, dict.fromkeys((*BARRED, "pair"), 4.0)
ONE_OLD_LOST = (-10.0, 15.0, 15.0, 15.0, 15.0)


class Month(NamedTuple):
    """How a month ended: the champion's true gain in points, drops suspended, what became of a bad one, extra runs."""

    gain: float
    honest_suspended: int
    bad_suspended: bool
    extra: float
    kept_out: bool = True


def equal_month(setup: Setup, seed: int) -> bool:
    """Return whether thirty nights of challengers that are exactly as good promote any."""
    loop = Loop(World.made(setup, seed), {})
    for night in range(NIGHTS):
        loop.night(FIRST + night)
    return loop.promotions > 0


def honest_month(seed: int) -> int:
    """Return how many of thirty honest drops are suspended, each of which brings today's champion 10 points."""
    suspended = 0
    for night in range(NIGHTS):
        loop = Loop(World.made(Setup(), seed * NIGHTS + night), {FIRST: np.full(5, 10.0)})
        loop.night(FIRST)
        suspended += len(loop.suspended)
    return suspended


def month(bad: str, seed: int) -> Month:
    """Return how a month of honest drops ends that bring a point each, with a bad one in the fifth night."""
    effects = {FIRST + night: np.ones(5) for night in range(1, NIGHTS + 1)}
    culprit = FIRST + BAD_NIGHT if BAD[bad] else 0
    if BAD[bad]:
        effects[culprit] = np.array(BAD[bad])
    nll = {culprit: LESS_LIKELY} if bad == "likelihood" else {}
    loop = Loop(World.made(Setup(), seed), effects, nll=nll)
    for night in range(1, NIGHTS + 1):
        loop.night(FIRST + night)
    gain, honest = float(loop.truth().mean()), loop.suspended - {culprit}
    return Month(gain, len(honest), culprit in loop.suspended, float(loop.extra_runs()), culprit not in loop.known)


def pair_month(seed: int) -> Month:
    """Return how a month of honest drops ends that bring a point each, with two that do harm together only."""
    effects = {FIRST + night: np.ones(5) for night in range(1, NIGHTS + 1)} | {drop: np.zeros(5) for drop in PAIR}
    loop = Loop(World.made(Setup(), seed), effects, together={PAIR: TOGETHER})
    for night in range(1, NIGHTS + 1):
        loop.night(FIRST + night)
    gain, found = float(loop.truth().mean()), loop.suspended & PAIR
    return Month(gain, len(loop.suspended - PAIR), bool(found), float(loop.extra_runs()))


def idle_month(seeds: float, seed: int) -> int:
    """Return how many of thirty drops that teach nothing are suspended, if trainings differ by so many points."""
    loop = Loop(World.made(Setup(), seed), {}, seeds=seeds)
    for night in range(NIGHTS):
        loop.night(FIRST + night)
    return len(loop.suspended)


def bulk_month(quiet_nights: int, seed: int) -> Month:
    """Return how quiet nights end after twenty drops came in one night, nineteen of +1 and one of -10."""
    drops = range(FIRST, FIRST + 20)
    effects = {drop: np.full(5, -10.0 if drop == FIRST + BAD_NIGHT else 1.0) for drop in drops}
    loop = Loop(World.made(Setup(), seed), effects)
    loop.night(*drops)
    for _ in range(quiet_nights):
        loop.quiet_night()
    bad = {FIRST + BAD_NIGHT}
    suspended = loop.suspended
    return Month(float(loop.truth().mean()), len(suspended - bad), bad <= suspended, float(loop.extra_runs()))


def nights_until(loop: Loop, drop: int) -> tuple[bool, ...]:
    """Return whether a drop serves after one, two and three nights; a drop that teaches nothing comes in each later."""
    serves = []
    for night in range(3):
        loop.night(FIRST + 1 + night if night else drop)
        serves.append(drop in loop.known)
    return tuple(serves)


def new_kind(setup: Setup, loss: float, former: int, seed: int) -> tuple[bool, ...]:
    """
    Return `nights_until` a drop of a new kind serves, +70 points on its own records, that costs the old drops some.

    The anchor holds it against so many former champions, all as good on the old drops as today's.
    """
    new = len(setup.sizes) - 1
    loop = Loop(World.made(setup, seed), {new: np.array((*(-loss,) * new, 70.0))})
    loop.former += [loop.world.answers().scores for _ in range(former)]
    return nights_until(loop, new)


def after_win(seed: int) -> tuple[bool, ...]:
    """Return `nights_until` a drop of a new kind serves after a drop that brought the old one 5 points has won."""
    effects = {1: np.array((0.0, 70.0)), FIRST: np.array((5.0, 0.0))}
    for place in range(10**3):
        loop = Loop(World.made(NEW_KIND_COMES, seed * 10**3 + place), effects)
        if loop.train({0, FIRST}).verdict.outcome == "promoted":
            return nights_until(loop, 1)
    raise SystemExit("+5 points win in no world")


def many_drops(drops: int, records: int, ruined: float, seed: int) -> tuple[bool, bool]:
    """Return whether +5 points on many drops, `ruined` on the first if that is set, are promoted, and suspended."""
    points = np.full(drops, 5.0)
    points[0] = ruined or 5.0
    loop = Loop(World.made(Setup(sizes=(records,) * drops, known=tuple(range(drops))), seed), {FIRST: points})
    loop.night(FIRST)
    return loop.promotions > 0, bool(loop.suspended)


def correction(stale: float, seed: int) -> tuple[bool, bool]:
    """Return whether right answers, +50 on their own records, are promoted, and suspended: `stale` % of 400 are old."""
    points = np.array((*(-0.6 * stale,) * 4, 50.0))
    loop = Loop(World.made(Setup(new_kinds=(4,)), seed), {4: points})
    loop.night(4)
    return loop.promotions > 0, bool(loop.suspended)


def rare_losses(seed: int) -> bool:
    """Return whether an equal candidate is promoted that gains on most of 200 records and loses all of a few."""
    world = World.made(Setup(metric=ROUGE, sizes=(40,) * 5), seed)
    champion = world.answers()
    comparison = world.side_by_side(champion, champion, champion.general)
    lost = world.random.random(world.drops.size) < RARE
    pair = np.column_stack((np.where(lost, 0.0, 1.0), np.full(lost.size, 1 - RARE)))
    return weigh(replace(comparison, scores={ROUGE: pair}), RULES).outcome == "promoted"


def walk(seed: int) -> tuple[float, float]:
    """Return how far down the first drop is after ten drops of new kinds, and how many were learned."""
    effects = {drop: np.eye(11)[drop] * 70 - np.eye(11)[0] * 3 for drop in range(1, 11)}
    loop = Loop(World.made(WALK, seed), effects)
    for drop in range(1, 11):
        loop.night(drop)
    return -float(loop.truth()[0]), float(len(loop.known) - 1)


def one_old_lost(seed: int) -> tuple[bool, bool]:
    """Return whether a winner that truly lost 10 points on one old drop is promoted at once, and with its trial."""
    loop = Loop(World.made(Setup(), seed), {FIRST: np.array(ONE_OLD_LOST)})
    loop.night(FIRST)
    return loop.promotions > 0 and not loop.trials, loop.promotions > 0


def first_run(loss: float, seed: int) -> bool:
    """Return whether the first drops are suspended: +20 points against the base, general abilities truly lost."""
    loop = Loop(World.made(Setup(known=()), seed), {FIRST: np.full(5, 20.0)}, harm={"general": loss})
    loop.night(FIRST)
    return bool(loop.suspended)


def card(setup: Setup, seed: int, candidates: int = CANDIDATES_A_CARD) -> list[bool]:
    """Return which candidates are promoted whose true gain is the smallest that an equal challenger's card states."""
    world = World.made(setup, seed)

    def beside(points: float) -> Comparison:
        champion = world.answers()
        return world.side_by_side(world.answers(points), champion, champion.general)

    stated = smallest_gain(beside(0.0), lambda drawn: promotes(drawn, RULES), seed, spread=setup.spread)
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
    print(f"{head}without it")
    for guard, (words, _) in CASES.items():
        bad = list(pool.map(partial(winner, guard), range(10**6, 10**6 + candidates // 2), chunksize=20))
        cost = np.array([wins and failed == {guard} for wins, failed in honest])
        kept = np.array([wins and not failed for wins, failed in bad])
        free = np.array([wins and failed <= {guard} for wins, failed in bad])
        print(f"{guard:<14}{measured(cost):<30}{words:<34}{measured(kept):<22}{measured(free)}", flush=True)


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
    """A question, with its answers and a bar: their mean lies between `least` and `most`."""

    words: str
    values: np.ndarray
    least: float = -np.inf
    most: float = np.inf

    def kept(self) -> bool:
        """Return whether the bar is kept; without one, it is."""
        return self.least <= interval(self.values)[0] <= self.most

    def line(self) -> str:
        """Return the row as it is printed."""
        ends = [end for end in (self.least, self.most) if np.isfinite(end)]
        sign = "" if len(ends) != 1 else ">= " if np.isfinite(self.least) else "<= "
        bar = sign + " to ".join(f"{end:g}" for end in ends)
        _, low, high = interval(self.values)
        near = high >= self.least and low <= self.most
        said = "kept" if self.kept() else "MISSED, within the interval" if near else "MISSED"
        return f"{self.words:<84}{measured(self.values):<24}{f'{bar:<10}{said}' if ends else ''}".rstrip()


@dataclass(frozen=True)
class Counts:
    """How much is simulated, and by whom."""

    pool: ProcessPoolExecutor
    months: int
    candidates: int
    cards: int

    def each(self, ask: Callable[..., Any], count: int) -> np.ndarray:
        """Return the results of the first `count` seeds."""
        return np.array(list(self.pool.map(ask, range(count), chunksize=5)))


def luck_rows(counts: Counts) -> Iterator[Row]:
    """Yield false promotions."""
    setups = {"exact match": Setup(), "ROUGE-L": Setup(metric=ROUGE), "groups of five": IN_GROUPS}
    for words, setup in setups.items():
        found = counts.each(partial(equal_month, setup), counts.months)
        yield Row(f"thirty equal nights, any promotion: {words}", found, most=14)
    found = counts.each(rare_losses, counts.candidates)
    yield Row("200 records, 1.2 % lose all and the others gain as much: promoted", found, most=1.5)


def _nights(words: str, found: np.ndarray, least: float = -np.inf, in_the_end: float = -np.inf) -> Iterator[Row]:
    """Yield how many are promoted after one, two and three nights, with the bars of the first and the third."""
    for night, bar in enumerate((least, -np.inf, in_the_end)):
        label = f"  the same by night {night + 1}" if night else f"{words}: promoted"
        yield Row(label, found[:, night], least=bar)


def candidate_rows(counts: Counts) -> Iterator[Row]:
    """Yield single candidates: honest, of a new kind, of many drops, bad on one old drop, a correction, the first."""
    found = counts.each(honest_month, max(counts.candidates // NIGHTS, 20))
    yield Row("thirty nights of an honest +10: honest drops suspended in the end", found, most=0.05)
    for words, (setup, loss, former, least, in_the_end) in NEW_KINDS.items():
        found = counts.each(partial(new_kind, setup, loss, former), counts.candidates)
        yield from _nights(f"a new kind comes, {words}", found, least, in_the_end)
    found = counts.each(after_win, counts.candidates)
    yield from _nights("a new kind comes, the champion has just won by 5 points", found, 90, 97)
    found = counts.each(partial(new_kind, Setup(ROUGE, (150, 100), (0,), (1,)), 0, 0), counts.candidates)
    yield from _nights("a new kind comes, 150 old truly unchanged, ROUGE-L", found)
    many = counts.each(partial(many_drops, 20, 100, 0.0), counts.candidates // 4)
    yield Row("+5 everywhere, 20 drops of 100 records: promoted", many[:, 0], least=97)
    yield Row("  the same: its drop suspended", many[:, 1], most=1)
    many = counts.each(partial(many_drops, 40, 25, -50.0), counts.candidates // 4)
    yield Row("+5 on 39 drops of 25 records, -50 on one: promoted", many[:, 0], most=10)
    lost = counts.each(one_old_lost, counts.candidates)
    yield Row("five drops, a winner (+10) truly lost 10 on one: promoted at once", lost[:, 0], most=20)
    yield Row("  the same, with the search's trial", lost[:, 1], most=20)
    for stale in (5, 20):
        found = counts.each(partial(correction, stale), counts.candidates // 2)
        yield Row(f"a correction, {stale} % of the old answers are out of date: promoted", found[:, 0])
        yield Row("  the same: suspended", found[:, 1])
    found = counts.each(partial(first_run, 2), counts.candidates // 4)
    yield Row("first run, +20 against the base, general truly -2: all data suspended", found)


def month_rows(counts: Counts) -> Iterator[Row]:
    """Yield months: of honest drops, with a bad one, two bad together, a bad one among nineteen, and idle ones."""
    asked: dict[str, tuple[Callable[[int], Month], str]] = {
        f"month, {words}": (partial(month, bad), bad) for bad, words in BAD_WORDS.items()
    }
    asked[f"month, {TOGETHER:g} by two drops together only"] = (pair_month, "pair")
    asked["twenty drops in one night, one of -10"] = (partial(bulk_month, 0), "bulk")
    asked["  the same, and one left out each quiet night"] = (partial(bulk_month, NIGHTS), "bulk")
    for words, (ask, bad) in asked.items():
        found = counts.each(ask, counts.months)
        if bad != "none":
            yield Row(f"{words}: the bad drop suspended", found[:, 2] > 0, least=FOUND.get(bad, -np.inf))
        if bad == "everywhere":
            yield Row(f"{words}: the bad drop kept out", found[:, 4] > 0, least=95)
        yield Row(
            f"{words}: honest drops suspended", found[:, 1].astype(np.int64), most=0.05 if bad in BARRED else np.inf
        )
        yield Row(f"{words}: true gain at the end", found[:, 0], least=LEAST_GAIN.get(bad, -np.inf))
        yield Row(f"{words}: extra runs", found[:, 3], most=MOST_RUNS.get(bad, np.inf))
    for seeds, most in ((0.0, 0.1), (2.0, 0.35)):
        found = counts.each(partial(idle_month, seeds), counts.months)
        yield Row(f"drops that teach nothing, seeds differ by {seeds:g} points: suspended a month", found, most=most)


def walk_rows(counts: Counts) -> Iterator[Row]:
    """Yield the walk away from the first drop."""
    found = counts.each(walk, counts.months)
    yield Row("ten new kinds, each truly -3 on the first drop: it ends so far down", found[:, 0], most=6.5)
    yield Row("  and so many were learned", found[:, 1])


def power_rows(counts: Counts) -> Iterator[Row]:
    """Yield the true power at the gain that a card states as shown in eight of ten cases."""
    for words, setup in POWER_SETUPS.items():
        found = np.concatenate(list(counts.pool.map(partial(card, setup), range(counts.cards))))
        yield Row(f"true power at a card's smallest gain: {words}", found, least=75, most=85)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--months", type=int, default=400)
    parser.add_argument("--candidates", type=int, default=1500)
    parser.add_argument("--cards", type=int, default=25)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    missed = []
    print(f"{'':<84}{'measured':<24}bar")
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
