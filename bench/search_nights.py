"""
Measure whether a search lets luck win more often: several trials a night, of which one is chosen and put to the gate.

    python bench/search_nights.py [--months 400] [--processes 2]

Thirty nights of candidates that are truly as good as the champion, in the world and loop of `bench/gate.py`. A model
of each trial answers 200 dev records and 500 held-out ones; the trial with the best mean on the first is taken, and the
gate judges it on the second. Two models differ on 20 % of the records, as two seeds of one training do. In
brackets 95 % intervals (Clopper and Pearson 1934). Bar: by a chi-squared test at .05 the share of months with a
promotion does not depend on the number of trials. The contrast peeks: the held-out scores decide what they are then the
proof of.

Measured, months with a promotion in per cent, put together of runs that were stopped before their 400: 1 trial 9.0
[5.4-13.9] (200 months), 4 trials 9.5 [5.8-14.4] (200), 16 trials 9.0 [3.4-18.5] (67). With a peek: 4 trials 20.7
[11.2-33.4] (58), 16 trials 31.4 [16.9-49.3] (35).
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

# A script finds only the files beside it, and a test loads this one from elsewhere.
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gate import NIGHTS, interval, measured
from bench.gate_world import FIRST, Loop, Model, Setup, World

TRIALS, PEEKED = (1, 4, 16), (4, 16)
HELD_OUT = Setup().sizes
#: The number of the drop whose records are for the choice alone.
DEV = len(HELD_OUT)
SETUP = Setup(sizes=(*HELD_OUT, 200))
LEVEL = 0.05


@dataclass
class Search(Loop):
    """A track whose every run makes so many candidates and puts one of them to the gate."""

    candidates: int = 1
    peeks: bool = False
    """Whether held-out scores choose."""

    def trained(self, drops: set[int]) -> Model:
        """Return the candidate that was chosen."""
        made = [super(Search, self).trained(drops) for _ in range(self.candidates)]
        return max(made, key=lambda model: model.scores[(self.world.drops == DEV) != self.peeks].mean())


def promotions(candidates: int, seed: int, *, peeks: bool = False) -> int:
    """Return how many candidates a month of thirty nights promotes that are exactly as good as their champion."""
    # The records for the choice are a drop that never comes: no gate is shown them.
    effects = {DEV: np.zeros(len(SETUP.sizes))}
    search = Search(World.made(SETUP, seed), effects, candidates=candidates, peeks=peeks)
    for night in range(NIGHTS):
        search.night(FIRST + night)
    return search.promotions


def same(months: Sequence[np.ndarray]) -> float:
    """Return the p-value of Pearson's chi-squared test that the share of months with a promotion is the same in all."""
    counts = [[np.count_nonzero(one), np.count_nonzero(one == 0)] for one in months]
    return float(stats.chi2_contingency(np.array(counts), correction=False).pvalue)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if more trials change what luck promotes, or if a peek does not show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--months", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    print(f"{'thirty equal nights, chosen by':<34}{'trials':<8}{'months with a promotion':<28}promotions a month")
    found: dict[tuple[bool, int], np.ndarray] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        for row, (peeks, candidates) in enumerate([*((False, k) for k in TRIALS), *((True, k) for k in PEEKED)]):
            # Months of their own for each row: the test of their shares takes them for independent.
            seeds = range(row * options.months, (row + 1) * options.months)
            ask = partial(promotions, candidates, peeks=peeks)
            counts = found[peeks, candidates] = np.array(list(pool.map(ask, seeds, chunksize=5)), dtype=np.int64)
            words = "held-out records, a peek" if peeks else "dev records"
            print(f"{words:<34}{candidates:<8}{measured(counts > 0):<28}{measured(counts)}", flush=True)
    p_value = same([found[False, candidates] for candidates in TRIALS])
    most = max(interval(found[False, candidates] > 0)[2] for candidates in TRIALS)
    kept = p_value > LEVEL
    seen = interval(found[True, PEEKED[-1]] > 0)[1] > most
    print(f"the same share with {TRIALS} trials: p = {p_value:.2f}, {'kept' if kept else 'MISSED'}")
    print(f"a peek shows: {'yes' if seen else 'NO'}")
    return 0 if kept and seen else 1


if __name__ == "__main__":
    sys.exit(main())
