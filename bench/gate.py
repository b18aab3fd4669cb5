"""
How often is a model promoted that is no better? Thirty nights of challengers exactly as good as the first champion.

Each row is a rule, each night one challenger on the same held-out records; a promoted challenger is the next champion,
with its lucky answers. `naive` promotes by the mean, `+2 points` by a margin, `ours` is `pipeline.decide.judge` as it
ships. Run: python bench/gate.py [MONTHS]
"""

import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pipeline.config import GateConfig
from pipeline.decide import Paired, judge

Scores = npt.NDArray[np.float64]
Rule = Callable[[str, Scores, Scores], bool]

NIGHTS = 30
RECORDS = 300
#: 60 % right answers, and 20 % of the records answered differently by two equal models.
ABILITY = (0.43, 0.286)
#: Each model's own noise about a record's score: paired differences with a standard deviation of 0.19.
NOISE = 0.134
MARGIN = 0.02


def naive(_metric: str, challenger: Scores, champion: Scores) -> bool:
    """Promote whatever has the higher mean."""
    return bool(challenger.mean() > champion.mean())


def by_margin(_metric: str, challenger: Scores, champion: Scores) -> bool:
    """Promote what is two points better, without a test."""
    return bool(challenger.mean() - champion.mean() >= MARGIN)


def ours(metric: str, challenger: Scores, champion: Scores) -> bool:
    """Promote what the gate promotes."""
    pairs = zip(challenger.tolist(), champion.tolist(), strict=True)
    paired = Paired(metric, {f"{place:04}": pair for place, pair in enumerate(pairs)}, candidate_nll=1.0)
    return judge(paired, GateConfig()).outcome == "promoted"


def month(rule: Rule, metric: str, seed: int) -> int:
    """Return the promotions in thirty nights in which nobody is better than anybody."""
    random = np.random.default_rng(seed)
    ability = random.beta(*ABILITY, RECORDS)

    def answers() -> Scores:
        if metric == "exact_match":
            return (random.random(RECORDS) < ability).astype(np.float64)
        return ability + random.normal(0, NOISE, RECORDS)

    champion, promotions = answers(), 0
    for _ in range(NIGHTS):
        challenger = answers()
        if rule(metric, challenger, champion):
            champion, promotions = challenger, promotions + 1
    return promotions


def main() -> None:
    """Print the table."""
    months = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    rules: dict[str, Rule] = {"naive (higher mean)": naive, "+2 points, no test": by_margin, "ours": ours}
    print(f"{months} months of {NIGHTS} nights, {RECORDS} held-out records, challengers truly equal")
    print(f"{'rule':<22}{'metric':<14}{'false promotions a month':>26}{'months with any':>18}")
    for metric in ("exact_match", "rougeL"):
        for name, rule in rules.items():
            counts = np.array([month(rule, metric, seed) for seed in range(months)])
            print(f"{name:<22}{metric:<14}{counts.mean():>26.2f}{np.mean(counts > 0):>18.0%}")


if __name__ == "__main__":
    main()
