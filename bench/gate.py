"""
Measure how often a model is promoted that is no better, and how often one that is.

    python bench/gate.py [--months 3000] [--candidates 1000] [--processes 2]

Null nights: thirty nights of challengers exactly as good as the first champion, on the same 500 held-out records of
five drops; a promoted challenger is the next champion, with its lucky answers. `naive` promotes by the mean,
`+2 points` by a margin, `ours` is `pipeline.gate.verdict.weigh`, the function that decides, with every guard on. Then
the power of the whole decision at the gain that the card states, and what each guard takes from it: the same candidates
with some guards only. Exit code 1 if a stated bound is missed.

Measured: ours promotes an equal model in about one month of nine, `naive` in nearly every month. Where all of a gain
stands in one drop of five, the guard on slices takes the chance of promotion from .92 to .58.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import stats

from pipeline.gate.comparison import Comparison, Suite
from pipeline.gate.statistics import Floats
from pipeline.gate.verdict import Rules, judge, weigh

NIGHTS, RECORDS, DROPS, SUITE_ITEMS, TOKENS = 30, 500, 5, 150, 10
#: 60 % right answers, and 20 % of the records answered differently by two equal models.
ABILITY = (0.43, 0.286)
#: Half of a suite's items solved, and 14 % of them differently by two equal models.
SUITE_ABILITY = (0.2, 0.2)
#: Each model's own noise about a record's score: paired differences with a standard deviation of 0.19.
NOISE = 0.134
MARGIN = 0.02
METRICS = {"exact_match": ("token_f1", "rougeL"), "rougeL": ("token_f1", "rouge1")}
#: The upper 95 % bound of the chance of any false promotion in a month, and the least power of the whole decision.
MOST_FALSE, LEAST_POWER = 0.15, 0.7
GUARD_SETS = ("none", "other metrics", "slices", "general suite", "likelihood and degenerate", "catastrophe", "all")


@dataclass(frozen=True)
class Model:
    """What one model did on the held-out records and on a suite of general abilities."""

    scores: dict[str, Floats]
    nll: Floats
    empty: Floats
    general: Floats


@dataclass(frozen=True)
class World:
    """Records of a known difficulty, on which models of a known quality answer."""

    metric: str
    ability: Floats
    difficulty: Floats
    """NLL of each record in nats a token."""
    general: Floats
    random: np.random.Generator

    @classmethod
    def made(cls, metric: str, seed: int) -> "World":
        """Return the world of a month."""
        random = np.random.default_rng(seed)
        return cls(
            metric,
            random.beta(*ABILITY, RECORDS),
            random.gamma(4, 0.3, RECORDS),
            random.beta(*SUITE_ABILITY, SUITE_ITEMS),
            random,
        )

    def answers(self, gain: float | Floats = 0.0, others: float = 0.0) -> Model:
        """Return a model that is better than the ability by `gain` on each record, by `others` in other metrics."""
        luck = self.random.normal(0, 1, RECORDS)
        scores = {}
        for name in METRICS[self.metric]:
            own = 0.8 * luck + 0.6 * self.random.normal(0, 1, RECORDS)
            scores[name] = self.ability + others + NOISE * own
        if self.metric == "exact_match":
            right = self.random.random(RECORDS) < self.ability
            chance = gain / (1 - ABILITY[0] / sum(ABILITY))
            scores[self.metric] = (right | (self.random.random(RECORDS) < chance)).astype(np.float64)
        else:
            scores[self.metric] = self.ability + gain + NOISE * luck
        return Model(
            scores=scores,
            nll=TOKENS * (self.difficulty + self.random.normal(0, 0.2, RECORDS)),
            empty=(self.random.random(RECORDS) < 0.01).astype(np.float64),
            general=(self.random.random(SUITE_ITEMS) < self.general).astype(np.float64),
        )


IDS = tuple(f"{place:06}" for place in range(RECORDS))
PLACES = np.arange(RECORDS) % DROPS
TAGGED = {"even": np.arange(RECORDS) // DROPS % 2 == 0}
NOTHING = np.zeros(RECORDS, dtype=np.bool_)


def side_by_side(metric: str, candidate: Model, champion: Model, kind: str = "all") -> Comparison:
    """Return what the gate is given, with what the guards of `kind` look at."""
    everything = kind == "all"

    def pair(one: Floats, other: Floats) -> Floats:
        return np.column_stack((one, other))

    names = [metric, *(METRICS[metric] if everything or kind == "other metrics" else ())]
    found = Comparison(
        metric=metric,
        ids=IDS,
        scores={name: pair(candidate.scores[name], champion.scores[name]) for name in names},
        drops=PLACES if everything or kind == "slices" else np.zeros(RECORDS, dtype=np.int64),
        pinned=NOTHING,
        replaced=NOTHING,
        tags=TAGGED if everything or kind == "slices" else {},
    )
    if everything or kind == "general suite":
        found = replace(found, suites=(Suite("general", pair(candidate.general, champion.general)),))
    if everything or kind == "likelihood and degenerate":
        tokens = np.full((RECORDS, 2), float(TOKENS))
        empty = {"empty": pair(candidate.empty, champion.empty)}
        found = replace(found, nll=(pair(candidate.nll, champion.nll), tokens), degenerate=empty)
    return found


RULES = Rules()
EVEN, STILL, CONCENTRATED = "other metrics gain as much", "other metrics do not move", "all of it on one drop of five"


def rules_for(kind: str) -> Rules:
    """Return rules under which the guard on catastrophes stands only where it is asked about."""
    if kind in {"all", "catastrophe"}:
        return RULES
    return replace(RULES, guards=RULES.guards.model_copy(update={"show_only": ("catastrophe",)}))


Rule = Callable[[str, Model, Model], bool]


def naive(metric: str, challenger: Model, champion: Model) -> bool:
    """Promote whatever has the higher mean."""
    return bool(challenger.scores[metric].mean() > champion.scores[metric].mean())


def by_margin(metric: str, challenger: Model, champion: Model) -> bool:
    """Promote what is two points better, without a test."""
    return bool(challenger.scores[metric].mean() - champion.scores[metric].mean() >= MARGIN)


def ours(metric: str, challenger: Model, champion: Model) -> bool:
    """Promote what the gate promotes."""
    return weigh(side_by_side(metric, challenger, champion), RULES).outcome == "promoted"


def unguarded(metric: str, challenger: Model, champion: Model) -> bool:
    """Promote what the gate's test alone promotes."""
    return weigh(side_by_side(metric, challenger, champion, "none"), rules_for("none")).outcome == "promoted"


RULES_TRIED: dict[str, Rule] = {
    "naive (higher mean)": naive, "+2 points, no test": by_margin, "ours without guards": unguarded, "ours": ours,
}  # fmt: skip


def month(metric: str, seed: int) -> list[int]:
    """Return each rule's promotions in thirty nights in which nobody is better than anybody."""
    counts = []
    for rule in RULES_TRIED.values():
        world = World.made(metric, seed)
        champion, promotions = world.answers(), 0
        for _ in range(NIGHTS):
            challenger = world.answers()
            if rule(metric, challenger, champion):
                champion, promotions = challenger, promotions + 1
        counts.append(promotions)
    return counts


def stated_gain(metric: str, seed: int) -> float:
    """Return the smallest gain, as a fraction, that the card of an equal challenger says it can show."""
    world = World.made(metric, seed)
    verdict = judge(side_by_side(metric, world.answers(), world.answers()), RULES)
    if verdict.smallest_detectable_gain is None:
        raise SystemExit("the card of 500 records says that it can show no gain")
    return verdict.smallest_detectable_gain / 100


def promoted(metric: str, gain: float, case: str, seed: int, kinds: Sequence[str] = GUARD_SETS) -> list[bool]:
    """Return whether a candidate with this true gain is promoted, with each set of guards."""
    world = World.made(metric, seed)
    # On one drop of five the same mean gain is five times as large.
    where = np.where(PLACES == 0, DROPS * gain, 0.0) if case == CONCENTRATED else gain
    champion, candidate = world.answers(), world.answers(where, 0.0 if case == STILL else gain)
    return [
        weigh(side_by_side(metric, candidate, champion, kind), rules_for(kind)).outcome == "promoted" for kind in kinds
    ]


def null_nights(pool: ProcessPoolExecutor, months: int) -> Iterator[bool]:
    """Print the months in which nobody is better; yield whether ours keeps its bound."""
    print(f"{months} months of {NIGHTS} nights, {RECORDS} held-out records, challengers truly equal")
    print(f"{'metric':<13}{'rule':<22}{'promotions a month':>20}{'months with any':>18}{'upper 95 % bound':>19}")
    for metric in METRICS:
        counts = np.array(list(pool.map(partial(month, metric), range(months), chunksize=5)))
        for name, column in zip(RULES_TRIED, counts.T, strict=True):
            hits = int(np.count_nonzero(column))
            bound = stats.binomtest(hits, months, alternative="less").proportion_ci(0.95).high
            print(f"{metric:<13}{name:<22}{column.mean():>20.2f}{hits / months:>18.3f}{bound:>19.3f}")
            if name == "ours":
                yield bool(bound <= MOST_FALSE)


def power(pool: ProcessPoolExecutor, candidates: int) -> Iterator[bool]:
    """Print how often a better candidate is promoted; yield whether the whole decision keeps its power."""
    print(f"\n{candidates} candidates better by the gain that the card states (median of 100 cards), on every record;")
    print("with each kind of guard alone, and with all of them")
    for metric in METRICS:
        gain = float(np.median(list(pool.map(partial(stated_gain, metric), range(10_000, 10_100), chunksize=10))))
        for case in (EVEN, STILL, CONCENTRATED):
            tried = pool.map(partial(promoted, metric, gain, case), range(20_000, 20_000 + candidates), chunksize=10)
            shares = np.array(list(tried)).mean(axis=0)
            print(f"{metric}, +{100 * gain:.1f} points, {case}")
            for kind, share in zip(GUARD_SETS, shares, strict=True):
                print(f"    {kind:<28}{share:>8.3f}{share - shares[0]:>+9.3f}")
            yield case == CONCENTRATED or bool(shares[-1] >= LEAST_POWER)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--months", type=int, default=3000)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor(options.processes) as pool:
        kept = [*null_nights(pool, options.months), *power(pool, options.candidates)]
    print(f"\nbounds: at most {MOST_FALSE} false, at least {LEAST_POWER} power: {'kept' if all(kept) else 'MISSED'}")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
