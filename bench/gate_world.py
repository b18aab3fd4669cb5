"""
What `bench/gate.py` simulates: models of a known quality on held-out records, and the nights of a track.

Exact match: .6 of the answers are right, and two equal models differ on 20 % of the records. ROUGE: a mean of .6, and
paired differences with a standard deviation of .2. A gain makes a part of the answers right, a loss a part of them
wrong; who is lucky is drawn anew for each training. Paraphrases share their difficulty, their gains and a part of their
luck. A suite has 300 items, and two equal models differ on 14 % of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from pipeline.artifacts import Verdict
from pipeline.decide.comparison import Comparison, Flags, Suite, pool
from pipeline.decide.policy import FORMER, suspends
from pipeline.decide.slices import Known
from pipeline.decide.statistics import Floats
from pipeline.decide.verdict import Rules, settle, weigh
from pipeline.evaluate.scoring import compare_with_control
from pipeline.metrics.degenerate import DEGENERATE

EXACT, ROUGE = "exact_match", "rougeL"
SUITE_ITEMS, TOKENS, RATE = 300, 10, 0.02
#: Two numbers of a beta distribution each: the records' difficulty with either metric, and that of the suite's items.
ABILITY = {EXACT: (0.43, 0.286), ROUGE: (3.0, 2.0)}
SUITE_ABILITY = (0.2, 0.2)
#: What a model of today makes of a kind of task that is new to it, and each model's own noise about a ROUGE score.
NEW_KIND, NOISE = 0.15, 0.145
#: How much paraphrases share their luck: tests record by record then err 3.7 and 5.2 % at 1 %, as measured.
SHARED = {EXACT: 0.4, ROUGE: 0.25}
#: The default of `gate.trials_per_week`.
TRIALS_A_WEEK = 7
#: The first number of a drop that comes in the night; those of the records' own drops are smaller.
FIRST = 100


@dataclass(frozen=True)
class Setup:
    """The held-out records: so many of each drop, in groups; which drops the champion knows; new kinds of task."""

    metric: str = EXACT
    sizes: tuple[int, ...] = (100,) * 5
    known: tuple[int, ...] = (0, 1, 2, 3)
    new_kinds: tuple[int, ...] = ()
    group: int = 1
    spread: bool = False
    """Whether a gain makes single answers right; otherwise all of a group."""


NEW_KIND_COMES = Setup(sizes=(150, 100), known=(0,), new_kinds=(1,))
WALK = Setup(sizes=(200, *(100,) * 10), known=(0,), new_kinds=tuple(range(1, 11)))


@dataclass(frozen=True)
class Model:
    """What one model did: its scores, its likelihood a record in nats, its bad answers, and the suite."""

    scores: Floats
    nll: Floats
    bad: Mapping[str, Floats]
    general: Floats


@dataclass(frozen=True)
class World:
    """Records of a known difficulty, on which models of a known quality answer."""

    setup: Setup
    drops: np.ndarray
    groups: np.ndarray
    ability: Floats
    difficulty: Floats
    general: Floats
    ids: tuple[str, ...]
    random: np.random.Generator

    @classmethod
    def made(cls, setup: Setup, seed: int) -> "World":
        """Return the world of a month."""
        random = np.random.default_rng(seed)
        drops = np.repeat(np.arange(len(setup.sizes)), setup.sizes)
        groups = np.arange(drops.size) // setup.group
        one, other = ABILITY[setup.metric]
        ability = random.beta(one, other, groups.max() + 1)[groups]
        ability[np.isin(drops, setup.new_kinds)] *= NEW_KIND * (one + other) / one
        difficulty, general = random.gamma(4, 0.3, drops.size), random.beta(*SUITE_ABILITY, SUITE_ITEMS)
        ids = tuple(f"{place:06}" for place in range(drops.size))
        return cls(setup, drops, groups, ability, difficulty, general, ids, random)

    def answers(self, points: float | Floats = 0.0, harm: Mapping[str, float] | None = None) -> Model:
        """Return a model that is better by so many points, on each drop's records or on all, and otherwise harmed."""
        gain = np.broadcast_to(np.asarray(points, dtype=np.float64), len(self.setup.sizes))[self.drops] / 100
        one, other = ABILITY[self.setup.metric]
        level = np.where(np.isin(self.drops, self.setup.new_kinds), NEW_KIND, one / (one + other))
        share = np.abs(gain) / np.where(gain > 0, 1 - level, level)
        lucky = (
            self.random.random(self.groups.size)[np.arange(self.groups.size) if self.setup.spread else self.groups]
            < share
        )
        shared, size = SHARED[self.setup.metric] if self.setup.group > 1 else 0.0, self.drops.size
        luck = np.sqrt(1 - shared) * self.random.normal(0, 1, size)
        if shared:
            luck += np.sqrt(shared) * self.random.normal(0, 1, size)[self.groups]
        if self.setup.metric == EXACT:
            scores = (special.ndtr(luck) < self.ability).astype(np.float64)
        else:
            scores = np.clip(self.ability + NOISE * luck, 0.0, 1.0)
        scores = np.where(lucky, gain > 0, scores).astype(np.float64)
        harm = harm or {}
        lost = self.random.random(SUITE_ITEMS) < harm.get("general", 0.0) / 100 / 0.5
        return Model(
            scores=scores,
            nll=TOKENS * (self.difficulty + harm.get("nll", 0.0) + self.random.normal(0, 0.2, size)),
            bad={
                kind: (self.random.random(size) < RATE * harm.get(kind, 1.0)).astype(np.float64) for kind in DEGENERATE
            },
            general=((self.random.random(SUITE_ITEMS) < self.general) & ~lost).astype(np.float64),
        )

    def side_by_side(
        self, candidate: Model, champion: Model, base: Floats, former: Sequence[Floats] = ()
    ) -> Comparison:
        """Return what the gate is given."""
        metric, size = self.setup.metric, self.drops.size
        return Comparison(
            metric=metric,
            ids=self.ids,
            scores={metric: np.column_stack((candidate.scores, champion.scores))},
            drops=self.drops,
            pinned=np.zeros(size, dtype=np.bool_),
            groups=self.groups,
            nll=(np.column_stack((candidate.nll, champion.nll)), np.full((size, 2), float(TOKENS))),
            degenerate={kind: np.column_stack((candidate.bad[kind], champion.bad[kind])) for kind in DEGENERATE},
            suites=(Suite("general", np.column_stack((candidate.general, champion.general)), base),),
            former=dict(enumerate(former)),
        )


@dataclass(frozen=True)
class Judged:
    """A run that was put before the gate."""

    drops: set[int]
    model: Model
    comparison: Comparison
    verdict: Verdict


@dataclass
class Loop:
    """
    One track, night by night: what is promoted, put on trial, suspended.

    As `daemon.queue.suspects` and `daemon.queue.leave_one_out` do. `effects`: what a drop does to each drop's records,
    in points; `together`: what a set of drops does besides; `nll`: how many nats per token a drop costs. Trainings
    differ in true quality, on all records alike, with the standard deviation `seeds`, in points.
    """

    world: World
    effects: dict[int, Floats]
    harm: Mapping[str, float] | None = None
    together: Mapping[frozenset[int], float] = field(default_factory=dict)
    nll: Mapping[int, float] = field(default_factory=dict)
    seeds: float = 0.0
    pending: list[int] = field(default_factory=list)
    suspended: set[int] = field(default_factory=set)
    trials: list[int] = field(default_factory=list)
    """The nights of the trials and controls."""
    former: list[Floats] = field(default_factory=list)
    """The scores of former champions, the oldest first."""
    again: int = 0
    """Runs that a search's end has made again."""
    promotions: int = 0
    _night: int = 0
    _left_out: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin with a champion."""
        self.known = set(self.world.setup.known)
        self._champion = self.world.answers()
        self._base = self.world.answers().general

    def night(self, *drops: int) -> None:
        """Take in drops, run, and search if the run speaks against them."""
        self._night += 1
        self.pending += drops
        self._run_all()

    def quiet_night(self) -> None:
        """Leave out a drop of the champion that was not left out since it serves, and run again if that won."""
        self._night += 1
        left = [drop for drop in sorted(self.known) if drop not in self._left_out and drop in self.effects]
        if not left or not self._may_try():
            return
        self._left_out.add(left[0])
        self.trials.append(self._night)
        if self.train(self.known - {left[0]}).verdict.outcome == "promoted":
            self._left_out.clear()
            self.pending.append(left[0])
            self._run_all()

    def truth(self) -> Floats:
        """Return what the champion truly gained on each drop's records, in points."""
        return self._truth(self.known)

    def extra_runs(self) -> int:
        """Return the trials, their controls and the runs that their end made again."""
        return len(self.trials) + self.again

    def trained(self, drops: set[int]) -> Model:
        """Return what a run on these drops puts before the gate."""
        quality = self.world.random.normal(0, self.seeds) if self.seeds else 0.0
        nll = sum(self.nll.get(drop, 0.0) for drop in drops)
        return self.world.answers(self._truth(drops) + quality, {"nll": nll, **(self.harm or {})})

    def _truth(self, drops: Iterable[int]) -> Floats:
        none, drops = np.zeros(len(self.world.setup.sizes)), set(drops)
        besides = sum(points for some, points in self.together.items() if some <= drops)
        return np.clip(sum((self.effects.get(drop, none) for drop in drops), none) + besides, -50.0, 80.0)

    def _held_out(self, drops: set[int]) -> Flags:
        """Return the records in a run: a drop's come with it."""
        come = {drop for drop in range(len(self.world.setup.sizes)) if drop not in self.effects}
        return np.asarray(np.isin(self.world.drops, list(come | drops)))

    def train(self, drops: set[int], before: Judged | None = None) -> Judged:
        """Train on these drops and put the result before the gate, of a trial with the run before; a winner serves."""
        candidate, former = self.trained(drops), self.former[-FORMER:]
        comparison = self.world.side_by_side(candidate, self._champion, self._base, former).part(self._held_out(drops))
        pooled = pool(comparison, before.comparison) if before is not None and before.drops == drops else None
        run = Judged(drops, candidate, comparison, weigh(comparison, self._rules(), pooled))
        if run.verdict.outcome == "promoted":
            self._serve(run)
        return run

    def _rules(self) -> Rules:
        return Rules(known=Known(frozenset(self.known) or None))

    def _serve(self, run: Judged) -> None:
        self.promotions += 1
        self.former.append(self._champion.scores)
        self._champion, self.known = run.model, run.drops
        self.pending = [drop for drop in self.pending if drop not in run.drops]

    def _run_all(self) -> None:
        run = self.train({*self.known, *self.pending})
        suspects = sorted(self.pending, reverse=True) if run.verdict.blames_new_drops else []
        if self._search(run, suspects) and self.pending:
            self.again += 1
            self._run_all()

    def _search(self, run: Judged, suspects: Sequence[int]) -> bool:
        """Try each with those cleared until one is blamed, and that with a control; return whether to run again."""
        won, cleared = False, set[int]()
        for drop in suspects:
            if not self._may_try():
                break
            self.trials.append(self._night)
            tried = self.train({*self.known, *cleared, drop}, run)
            if tried.verdict.blames_new_drops:
                self._control(run, tried, drop)
                return won or drop in self.suspended | self.known
            cleared.add(drop)
            won = won or tried.verdict.outcome == "promoted"
        return won

    def _may_try(self) -> bool:
        return sum(night > self._night - 7 for night in self.trials) < TRIALS_A_WEEK

    def _control(self, run: Judged, tried: Judged, drop: int) -> None:
        """Train without new drops: suspend the drop that was tried, or let its trial serve, or neither."""
        self.trials.append(self._night)
        champion, known, rules = self._champion, set(self.known), self._rules()
        control = self.train(known)
        comparison = self.world.side_by_side(tried.model, control.model, self._base).part(self._held_out(known))
        if suspends(compare_with_control(comparison, tried.verdict)):
            self.suspended.add(drop)
            self.pending.remove(drop)
        elif run.drops == tried.drops and champion is self._champion:
            pooled = pool(tried.comparison, run.comparison, control.comparison)
            settled = settle(tried.verdict, tried.comparison, pooled, rules)
            if settled is not None and settled.passed:
                self._serve(tried)
