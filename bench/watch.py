"""
How often a return to a former champion is proposed: if the champion is as good, and if it is worse.

`python bench/watch.py` calls the product's rule (`pipeline.decide.watch`) for years of 365 nights with a drop each. Two
equal models differ on 20 % of the records; a drop's own difference has a standard deviation of 0, 5 or 10 points. In
0 or 0.6 % of the nights another champion wins, which is as good as today's: the next watch is with a later former one.
"""

import argparse
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from pipeline.decide.policy import WATCH_RETURN, WATCH_START
from pipeline.decide.watch import watch_of

NIGHTS, DIFFER = 365, 0.2
#: The champion's mean difference from the former one, in points, and the share of nights in which another one wins.
CHAMPIONS = ((0, 0.0), (0, 0.006), (-5, 0.006), (-10, 0.006))


class Night(NamedTuple):
    """The numbers of drops on which the champion was worse and better than the former champion `former`."""

    worse: int
    better: int
    former: int = 0


def signs(random: Generator, rows: int, points: float, spread: float) -> list[int]:
    """Return, night by night, the sign of the champion's net on a drop; it is better by `points` on average."""
    gains = np.clip((points + spread * random.normal(size=NIGHTS)) / 100, -1, 1)
    differ = np.maximum(DIFFER, np.abs(gains))
    wins = random.binomial(rows, (differ + gains) / 2)
    lost = np.clip((differ - gains) / np.maximum(2 - differ - gains, 1e-12), 0, 1)
    return list(map(int, np.sign(wins - random.binomial(rows - wins, lost))))


def proposed(came: np.ndarray, outcomes: list[int]) -> float:
    """Return the night in which a return is proposed, infinite if none; `came` says when another champion wins."""
    nights: list[Night] = []
    is_later = False
    for night, sign in enumerate(outcomes):
        nights.append(Night(int(sign < 0), int(sign > 0)))
        is_later |= bool(came[night])
        # The evidence rises with a lost drop alone, and with a new start of the count.
        watch = watch_of(nights) if sign < 0 or len(nights) % WATCH_START == 1 or is_later else None
        if watch and watch.reached == WATCH_RETURN:
            return night + 1
        if watch and watch.is_over and is_later:
            nights, is_later = [], False
    return float("inf")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="How often the return of a champion is proposed.")
    parser.add_argument("--years", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("the goals: equal ones in 1 % of the years at most; the median night 20 at -10 points, 60 at -5")
    heads = "champion", "others win", " rows", "drops differ by", "  years", "    proposed in", "median night"
    print("  ".join(heads))
    for points, wins in CHAMPIONS:
        # One that is worse is found in nearly all years, and early: fewer years tell as much.
        years = given.years if points == 0 else given.years // 4
        for rows in (30, 100):
            for spread in (0, 5, 10):
                random = np.random.default_rng(given.seed)
                ends = [
                    proposed(random.random(NIGHTS) < wins, signs(random, rows, points, spread)) for _ in range(years)
                ]
                share = np.isfinite(ends).mean()
                half = 196 * np.sqrt(share * (1 - share) / years)
                told = f"{100 * share:.2f} % ±{half:.2f}"
                numbers = f"{points:+}", f"{wins:.1%}", rows, spread, f"{years:,}", told, f"{np.median(ends):g}"
                print(
                    "  ".join(f"{value:>{len(head)}}" for head, value in zip(heads, numbers, strict=True)), flush=True
                )


if __name__ == "__main__":
    main()
