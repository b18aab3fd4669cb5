"""From trial to trial until the budget is spent, then the choice: what a step does whose run has a search."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted, StartAgain, StepFailed, is_disk_full
from pipeline.search_settings import most_trials, with_settings
from pipeline.train.search.choice import DevScores, choose
from pipeline.train.search.dev_scores import Scored
from pipeline.train.search.soup import why_not
from pipeline.train.search.suggest import MedianRule, Tried, suggest
from pipeline.train.search.trial_attempt import BudgetTooSmall, TrialAttempt
from pipeline.train.search.trial_files import MOST_DEATHS, Begun, Ended, TrainedOnce, TrialFiles
from pipeline.trial import Candidate, settings_words
from pipeline.words import count

_TRIAL = "trial "
_HOUR = 3600.0
_ERROR_CHARACTERS = 1000
#: What leaves a trial to a later process; everything else that goes wrong in it is one trial lost.
_LATER = (Interrupted, StartAgain, BudgetTooSmall)
_ID_CHARACTERS = 12


@dataclass(frozen=True)
class Work:
    """What a search has done: by the step, which knows rows and models."""

    train: Callable[[Attempt, Path, MedianRule], TrainedOnce]
    """Trains once by the attempt's settings and leaves the adapter in a folder."""
    score: Callable[[Attempt, Path], Scored]
    """Asks an adapter the dev rows."""
    combine: Callable[[str, tuple[Path, Path], Path], None]
    """Combines two adapters by a method into a folder."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    once: TrainedOnce
    """The chosen training."""
    adapter: Path
    """Its adapter, in the checkpoint folder."""
    candidates: tuple[Candidate, ...]
    has_champion: bool
    """Whether the champion's adapter is part of it."""
    seconds: float
    """All of them together."""


def search(attempt: Attempt, mark: str, work: Work) -> Found:
    """
    Try what the space of [train.search] has, within its budget, and return the candidate that the dev rows choose.

    With `train.soup` the best of them is combined with the champion's adapter and with the second best. Without a space
    there is one training.

    `mark` is the fingerprint of what is searched: trials that were made under another one are forgotten. Raises
    `Interrupted` or `StartAgain` where a training does, `CannotTrain` if not even one trial fits into the budget, or
    if all of them failed.
    """
    files = TrialFiles(attempt.path(attempt.spec.checkpoints))
    files.claim(mark)
    one = _Search(attempt, files, work)
    while (begun := one.next()) is not None:
        one.work_on(begun)
    for soup in one.soups():
        one.work_on(soup)
    ended = files.ended()
    if all(trial.outcome == "failed" for trial in ended):
        files.clear()
        message = f"no trial of the search ended well; the first: {ended[0].why}"
        raise CannotTrain(message, ended[0].hint or "lower what [train.search] tries")
    return _found(files, ended, one.champion)


@dataclass(frozen=True)
class _Search:
    """A search at work; what it knows is in its files."""

    attempt: Attempt
    files: TrialFiles
    work: Work

    @property
    def champion(self) -> str:
        """Today's champion, as a soup names it: another one may serve when a killed search goes on."""
        return f"champion {self.attempt.spec.champion.model_id[:_ID_CHARACTERS]}"

    def next(self) -> Begun | None:
        """Return the trial to work on: one that was interrupted, or the next; `None` if there is none."""
        train, ended = self.attempt.config.train, self.files.ended()
        number = len(ended) + 1
        begun = self.files.begun(number)
        if begun is not None:
            return begun
        spent, longest = _seconds(ended), max((one.seconds for one in ended), default=0.0)
        if train.search.hours and ended and spent + longest > train.search.hours * _HOUR:
            sys.stderr.write(f"no further trial fits into train.search.hours = {train.search.hours:g}\n")
            return None
        past = [Tried(one.settings, _mean(one), one.losses) for one in ended if not one.of]
        settings = suggest(train, past)
        return None if settings is None else self._thought_of(Begun(number=number, settings=settings))

    def soups(self) -> Iterator[Begun]:
        """Yield what is to be combined and was not yet: the best trial with the champion's adapter, and the second."""
        methods = self.attempt.config.train.soup
        trials = [one for one in self.files.ended() if one.outcome == "finished" and not one.of]
        if not methods or not trials:
            return
        best = _chosen(trials)
        others = [one for one in trials if one is not best]
        partners = [_name(_chosen(others).number)] if others else []
        if words := self._no_champion():
            sys.stderr.write(f"no soup with the champion: {words}\n")
        else:
            partners.insert(0, self.champion)
        for partner, method in product(partners, methods):
            of = (_name(best.number), partner)
            ended = self.files.ended()
            if any((one.of, one.settings) == (of, {"soup": method}) for one in ended):
                continue
            if words := why_not(method, *map(self._adapter, of)):
                sys.stderr.write(f"no soup of {' and '.join(of)}: {words}\n")
                continue
            yield self._thought_of(Begun(number=len(ended) + 1, settings={"soup": method}, of=of))

    def _thought_of(self, begun: Begun) -> Begun:
        """Write a trial down and return it as it is read: what was a tuple is a list from now on."""
        self.files.write(begun)
        return self.files.begun(begun.number) or begun

    def _no_champion(self) -> str:
        """Say why the champion's adapter is of no use; empty if it is of use."""
        spec = self.attempt.spec
        if spec.champion_adapter is None:
            return "it is the base model, or its adapter is not there any more"
        left = set(spec.champion.drops or ()) - {drop.id for drop in spec.drops}
        if spec.champion.drops is None or left:
            return f"it was trained on drops that this run is not: {', '.join(map(str, sorted(left))) or 'not known'}"
        return ""

    def _adapter(self, name: str) -> Path:
        """Return the folder of an adapter that goes into a soup."""
        if name.startswith(_TRIAL):
            return self.files.adapter(int(name.removeprefix(_TRIAL)))
        if name != self.champion or self.attempt.spec.champion_adapter is None:
            raise StepFailed(f"{name} is not the champion any more, or its adapter is gone")
        return self.attempt.path(self.attempt.spec.champion_adapter)

    def work_on(self, begun: Begun) -> None:
        """Work on a trial until it has ended. Raises what leaves it to a later process."""
        begun = self.files.enter(begun)
        trial = self._attempt(begun)
        again = None
        try:
            outcome = _lost(begun) if begun.deaths >= MOST_DEATHS else self._outcome(trial, begun)
        except _LATER:
            self.files.leave(begun, trial.seconds)
            raise
        except DropforgeError as error:
            outcome = {"outcome": "failed", "why": error.message, "hint": error.hint}
        except Exception as error:
            if is_disk_full(error):
                self.files.leave(begun, trial.seconds)
                raise
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
            outcome = {"outcome": "failed", "why": why}
            # Nobody knows what it left of libraries and device.
            again = StartAgain(f"trial {begun.number} failed, and the next one begins in a fresh process: {why}")
        finally:
            with contextlib.suppress(OSError):  # trackers have left their files there
                trial.folder.rmdir()
        seconds = begun.seconds + trial.seconds
        self.files.end(Ended(number=begun.number, settings=begun.settings, of=begun.of, seconds=seconds, **outcome))
        if again is not None:
            raise again

    def _attempt(self, begun: Begun) -> TrialAttempt:
        train, ended = self.attempt.config.train, self.files.ended()
        own = {} if begun.of else begun.settings
        trial = TrialAttempt(self.attempt, begun.number, with_settings(train, own), self.files.plan())
        most = max(most_trials(train.search), begun.number)
        what = f"soup of {' and '.join(begun.of)}" if begun.of else f"{_name(begun.number)} of {most}"
        words = ": ".join(filter(None, (what, settings_words(begun.settings))))
        sys.stderr.write(f"{words}\n")
        spent = _seconds(ended)
        trial.describe(words, most - begun.number, spent + begun.seconds, spent / len(ended) if ended else None)
        return trial

    def _outcome(self, trial: TrialAttempt, begun: Begun) -> dict[str, Any]:
        """Train, unless that is done, and ask the dev rows; return what is to be kept of it."""
        number = begun.number
        once = self.files.trained(number)
        if once is None:
            target = self.files.new_adapter(number)
            once = self._combined(begun, target) if begun.of else self.work.train(trial, target, self._median())
            self.files.keep(number, once)
        kept = {"losses": () if begun.of else [point.loss for point in once.trained.dev_curve], "once": once}
        if once.trained.pruned:
            return {"outcome": "pruned", **kept}
        scored = self.work.score(trial, self.files.adapter(number))
        return {"outcome": "finished", "by": scored.by, "scores": scored.scores, "weights": scored.weights, **kept}

    def _median(self) -> MedianRule:
        whole = [one.losses for one in self.files.ended() if one.outcome == "finished" and not one.of]
        return MedianRule(tuple(whole))

    def _combined(self, begun: Begun, target: Path) -> TrainedOnce:
        """Combine two adapters; the result is told as the better one's training, and costs as much as both."""
        known = {_name(one.number): one.once for one in self.files.ended()}
        best, other = (known.get(name) for name in begun.of)
        assert best is not None  # noqa: S101 - it finished
        self.work.combine(begun.settings["soup"], (self._adapter(begun.of[0]), self._adapter(begun.of[1])), target)
        return best.model_copy(update={"cost": best.cost + (other or best).cost})


def _name(number: int) -> str:
    return f"{_TRIAL}{number}"


def _chosen(finished: Sequence[Ended]) -> Ended:
    """Return the one that the dev rows choose."""
    return finished[choose([DevScores(one.scores, one.weights, one.once.cost) for one in finished if one.once])]


def _lost(begun: Begun) -> dict[str, Any]:
    why = (
        f"its process vanished {count(begun.deaths, 'time')} in a row without a word; if memory ran out, dmesg says so"
    )
    return {"outcome": "failed", "why": why}


def _found(files: TrialFiles, ended: Sequence[Ended], champion: str) -> Found:
    """Choose among those that finished, of which there is one at least; soups with a former champion do not count."""
    named = [name for one in ended for name in one.of if not name.startswith(_TRIAL) and name != champion]
    finished = [one for one in ended if one.outcome == "finished" and not set(one.of) & set(named)]
    chosen = _chosen(finished)
    best = max(finished, key=lambda one: _mean(one) or 0.0)
    why = "the best on the dev rows"
    if _mean(best) != _mean(chosen):
        why = f"within one standard error of the best, {best.number}, and cheaper"
    assert chosen.once is not None  # noqa: S101 - it finished
    return Found(
        once=chosen.once,
        adapter=files.adapter(chosen.number),
        candidates=tuple(_candidate(one, why if one is chosen else None) for one in ended),
        has_champion=champion in chosen.of,
        seconds=_seconds(ended),
    )


def _candidate(one: Ended, chosen: str | None) -> Candidate:
    mean = _mean(one)
    return Candidate(
        number=one.number,
        settings={**one.settings, **({"of": list(one.of)} if one.of else {})},
        outcome=one.outcome,
        dev_score=None if mean is None else mean * (1 if one.by == "nll" else 100),
        scored_by=one.by,
        dev_loss=one.losses[-1] if one.losses else None,
        seconds=one.seconds,
        tokens=one.once.trained.trained_tokens if one.once and not one.of else 0,
        chosen=chosen is not None,
        why=chosen or one.why,
    )


def _mean(one: Ended) -> float | None:
    return DevScores(one.scores, one.weights, 0.0).mean if one.scores else None


def _seconds(ended: Sequence[Ended]) -> float:
    return sum(one.seconds for one in ended)
