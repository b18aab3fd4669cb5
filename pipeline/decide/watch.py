"""Test on later drops whether the champion is worse than a former one. Pure, without numpy: the daemon imports it."""

from collections.abc import Sequence
from functools import lru_cache
from math import comb
from typing import Any

from pipeline.artifacts import Frozen
from pipeline.decide.policy import WATCH_END, WATCH_NIGHTS, WATCH_NOTICE, WATCH_RETURN, WATCH_START


class Watch(Frozen):
    """What later drops say of a track's champions since a watch began, compared with one former champion."""

    former: int
    """Generation of the former champion."""
    nights: int
    """Runs with drops that were new to both."""
    worse: int
    """Drops on which the champion was worse, since the start of the count that weighs most."""
    better: int
    evidence: float
    """That the champion is worse: equal ones reach x with probability 1/x at most."""

    @property
    def reached(self) -> int:
        """The limit that the evidence has reached: `WATCH_RETURN`, `WATCH_NOTICE` or 0."""
        return max(limit for limit in (0, WATCH_NOTICE, WATCH_RETURN) if self.evidence >= limit)

    @property
    def is_over(self) -> bool:
        """
        Whether a later former champion may be compared instead.

        It may at evidence of `WATCH_END` or less, or after `WATCH_NIGHTS` runs if the evidence has reached no limit.
        """
        return self.evidence <= WATCH_END or (self.nights >= WATCH_NIGHTS and not self.reached)

    @property
    def words(self) -> str:
        """The counts as a sentence, which is the reason of a return."""
        drops = self.worse + self.better
        return f"generation {self.former} answered {self.worse} of the last {drops} new drops better than the champion"


def watch_of(nights: Sequence[Any]) -> Watch | None:
    """
    Return the watch of `nights`, rows (former, worse, better) with numbers of drops, oldest first; `None` without any.

    The evidence is the e-value of all nights / 2 + that of the nights from the 31st on / 6 + … The weights
    1 / ((k + 1)(k + 2)) sum to 1, so Ville's inequality holds for the sum. Later starts find what became worse.
    """
    worse = better = 0
    terms = []
    for index in reversed(range(len(nights))):
        worse, better = worse + nights[index].worse, better + nights[index].better
        if index % WATCH_START == 0:
            k = index // WATCH_START
            terms.append((e_value(worse, better) / ((k + 1) * (k + 2)), worse, better))
    if not terms:
        return None
    evidence, (_, worse, better) = sum(term for term, _, _ in terms), max(terms)
    return Watch(former=nights[0].former, nights=len(nights), worse=worse, better=better, evidence=evidence)


@lru_cache(maxsize=10_000)
def e_value(worse: int, better: int) -> float:
    """
    Return 2^(worse + better) * 2 * the integral from 1/2 to 1 of t^worse (1 - t)^better dt, at most 10^9.

    It is the likelihood ratio of "the champion loses a share t of the drops", t uniform above 1/2, to "a half". The
    integral, an incomplete beta function of whole numbers, is a tail of the binomial distribution (DLMF 8.17.5).
    """
    drops = worse + better
    tail = term = 1
    for k in range(worse):
        term = term * (drops + 1 - k) // (k + 1)  # comb(drops + 1, k + 1)
        tail += term
    ways = (drops + 1) * comb(drops, worse)
    return min(tail, 10**9 * ways) / ways
