"""Run the trials of a search until its budget is spent, then choose one by the dev rows."""

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
from pipeline.search_settings import Trial, most_trials, settings_words, with_settings
from pipeline.train.search.choice import DevScores, choose
from pipeline.train.search.dev_scores import Scored
from pipeline.train.search.soup import why_not
from pipeline.train.search.suggest import MedianRule, Tried, suggest
from pipeline.train.search.trial_attempt import BudgetTooSmall, TrialAttempt
from pipeline.train.search.trial_files import MOST_DEATHS, Begun, Ended, TrainedOnce, TrialFiles
from pipeline.words import count

_TRIAL = "trial "
_HOUR = 3600.0
_ERROR_CHARACTERS = 1000
#: Errors after which a later process continues the trial; any other error fails the trial.
_LATER = (Interrupted, StartAgain, BudgetTooSmall)
_ID_CHARACTERS = 12


@dataclass(frozen=True)
class Work:
    """The functions of the step that a search calls: train, score, combine."""

    train: Callable[[Attempt, Path, MedianRule], TrainedOnce]
    """Trains once with the attempt's settings and saves the adapter in a folder."""
    score: Callable[[Attempt, Path], Scored]
    """Scores an adapter on the dev rows."""
    combine: Callable[[str, tuple[Path, Path], Path], None]
    """Combines two adapters by a method and saves the result in a folder."""


@dataclass(frozen=True)
class SearchResult:
    """The chosen trial of a search, and the outcome of all trials."""

    once: TrainedOnce
    """The chosen training."""
    adapter: Path
    """Its adapter, in the checkpoint folder."""
    trials: tuple[Trial, ...]
    has_champion: bool
    """Whether the champion's adapter is part of it."""
    seconds: float
    """All trials together."""


def search(attempt: Attempt, mark: str, work: Work) -> SearchResult:
    """
    Run the trials of [train.search] within its budget, and return the one that is best on the dev rows.

    With `train.soup` the best is also combined with the champion's adapter and with the second best. Without a space
    there is one trial.

    `mark` is the search's fingerprint: trials of another one are deleted. Raises `Interrupted` or `StartAgain` where a
    training does, `CannotTrain` if not even one trial fits into the budget, or if all of them failed.
    """
    files = TrialFiles(attempt.path(attempt.spec.checkpoints))
    files.claim(mark)
    running = _Search(attempt, files, work)
    while (begun := running.next()) is not None:
        running.work_on(begun)
    for soup in running.soups():
        running.work_on(soup)
    ended = files.ended()
    if all(trial.outcome == "failed" for trial in ended):
        files.clear()
        message = f"all trials of the search failed; the first: {ended[0].why}"
        raise CannotTrain(message, ended[0].hint or "set smaller values in [train.search]")
    return _result(files, ended, running.champion)


@dataclass(frozen=True)
class _Search:
    """A running search; its state is in its files."""

    attempt: Attempt
    files: TrialFiles
    work: Work

    @property
    def champion(self) -> str:
        """Today's champion, as a soup names it: it may be another when a killed search resumes."""
        return f"champion {self.attempt.spec.champion.model_id[:_ID_CHARACTERS]}"

    def next(self) -> Begun | None:
        """Return the interrupted trial or the next one; `None` if there is none."""
        train, ended = self.attempt.config.train, self.files.ended()
        number = len(ended) + 1
        begun = self.files.begun(number)
        if begun is not None:
            return begun
        spent, longest = _seconds(ended), max((trial.seconds for trial in ended), default=0.0)
        if train.search.hours and ended and spent + longest > train.search.hours * _HOUR:
            sys.stderr.write(f"no further trial fits into train.search.hours = {train.search.hours:g}\n")
            return None
        past = [Tried(trial.settings, _mean(trial), trial.losses) for trial in ended if not trial.of]
        settings = suggest(train, past)
        return None if settings is None else self._written(Begun(number=number, settings=settings))

    def soups(self) -> Iterator[Begun]:
        """Yield the combinations still to make: the best trial with the champion's adapter and the second best."""
        methods = self.attempt.config.train.soup
        trials = [trial for trial in self.files.ended() if trial.outcome == "finished" and not trial.of]
        if not methods or not trials:
            return
        best = _chosen(trials)
        others = [trial for trial in trials if trial is not best]
        partners = [_name(_chosen(others).number)] if others else []
        if words := self._no_champion():
            sys.stderr.write(f"no soup with the champion: {words}\n")
        else:
            partners.insert(0, self.champion)
        for partner, method in product(partners, methods):
            of = (_name(best.number), partner)
            ended = self.files.ended()
            if any((trial.of, trial.settings) == (of, {"soup": method}) for trial in ended):
                continue
            if words := why_not(method, *map(self._adapter, of)):
                sys.stderr.write(f"no soup of {' and '.join(of)}: {words}\n")
                continue
            yield self._written(Begun(number=len(ended) + 1, settings={"soup": method}, of=of))

    def _written(self, begun: Begun) -> Begun:
        """Write a trial's file and return the trial as read from it: tuples are lists from now on."""
        self.files.write(begun)
        return self.files.begun(begun.number) or begun

    def _no_champion(self) -> str:
        """Return why the champion's adapter cannot be combined; empty if it can."""
        spec = self.attempt.spec
        if spec.champion_adapter is None:
            return "it is the base model, or its adapter was deleted"
        left = set(spec.champion.drops or ()) - {drop.id for drop in spec.drops}
        if spec.champion.drops is None or left:
            return (
                f"it was trained on drops that this run does not have: {', '.join(map(str, sorted(left))) or 'unknown'}"
            )
        return ""

    def _adapter(self, name: str) -> Path:
        """Return the folder of an adapter by its name in a soup."""
        if name.startswith(_TRIAL):
            return self.files.adapter(int(name.removeprefix(_TRIAL)))
        if name != self.champion or self.attempt.spec.champion_adapter is None:
            raise StepFailed(f"{name} is no longer the champion, or its adapter was deleted")
        return self.attempt.path(self.attempt.spec.champion_adapter)

    def work_on(self, begun: Begun) -> None:
        """Run a trial to its end. Raises errors after which a later process continues it."""
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
            # Libraries and device may be in an undefined state.
            again = StartAgain(f"trial {begun.number} failed, the next begins in a fresh process: {why}")
        finally:
            with contextlib.suppress(OSError):  # experiment trackers may have left files
                trial.folder.rmdir()
        seconds = begun.seconds + trial.seconds
        self.files.end(Ended(number=begun.number, settings=begun.settings, of=begun.of, seconds=seconds, **outcome))
        if again is not None:
            raise again

    def _attempt(self, begun: Begun) -> TrialAttempt:
        train, ended = self.attempt.config.train, self.files.ended()
        settings = {} if begun.of else begun.settings
        trial = TrialAttempt(self.attempt, begun.number, with_settings(train, settings), self.files.plan())
        most = max(most_trials(train.search), begun.number)
        what = f"soup of {' and '.join(begun.of)}" if begun.of else f"{_name(begun.number)} of {most}"
        words = ": ".join(filter(None, (what, settings_words(begun.settings))))
        sys.stderr.write(f"{words}\n")
        spent = _seconds(ended)
        trial.describe(words, most - begun.number, spent + begun.seconds, spent / len(ended) if ended else None)
        return trial

    def _outcome(self, trial: TrialAttempt, begun: Begun) -> dict[str, Any]:
        """Train, unless already done, and score on the dev rows; return the fields of the ended trial."""
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
        whole = [trial.losses for trial in self.files.ended() if trial.outcome == "finished" and not trial.of]
        return MedianRule(tuple(whole))

    def _combined(self, begun: Begun, target: Path) -> TrainedOnce:
        """Combine two adapters; return the better one's training with the cost of both."""
        known = {_name(trial.number): trial.once for trial in self.files.ended()}
        best, other = (known.get(name) for name in begun.of)
        assert best is not None  # noqa: S101 - it finished
        self.work.combine(begun.settings["soup"], (self._adapter(begun.of[0]), self._adapter(begun.of[1])), target)
        return best.model_copy(update={"cost": best.cost + (other or best).cost})


def _name(number: int) -> str:
    return f"{_TRIAL}{number}"


def _chosen(finished: Sequence[Ended]) -> Ended:
    """Return the trial chosen by the dev rows."""
    return finished[choose([DevScores(x.scores, x.weights, x.once.cost) for x in finished if x.once])]


def _lost(begun: Begun) -> dict[str, Any]:
    why = (
        f"its process vanished {count(begun.deaths, 'time')} in a row without an error; see dmesg for a lack of memory"
    )
    return {"outcome": "failed", "why": why}


def _result(files: TrialFiles, ended: Sequence[Ended], champion: str) -> SearchResult:
    """Choose among the finished trials, at least one; soups with a former champion are excluded."""
    former = {name for trial in ended for name in trial.of if not name.startswith(_TRIAL) and name != champion}
    finished = [trial for trial in ended if trial.outcome == "finished" and not former & set(trial.of)]
    chosen = _chosen(finished)
    best = max(finished, key=lambda trial: _mean(trial) or 0.0)
    why = "best on the dev rows"
    if _mean(best) != _mean(chosen):
        why = f"within one standard error of the best (trial {best.number}), and cheaper"
    assert chosen.once is not None  # noqa: S101 - it finished
    return SearchResult(
        once=chosen.once,
        adapter=files.adapter(chosen.number),
        trials=tuple(_trial(one, why if one is chosen else None) for one in ended),
        has_champion=champion in chosen.of,
        seconds=_seconds(ended),
    )


def _trial(ended: Ended, chosen: str | None) -> Trial:
    mean = _mean(ended)
    return Trial(
        number=ended.number,
        settings={**ended.settings, **({"of": list(ended.of)} if ended.of else {})},
        outcome=ended.outcome,
        dev_score=None if mean is None else mean * (1 if ended.by == "nll" else 100),
        scored_by=ended.by,
        dev_loss=ended.losses[-1] if ended.losses else None,
        seconds=ended.seconds,
        tokens=ended.once.trained.trained_tokens if ended.once and not ended.of else 0,
        chosen=chosen is not None,
        why=chosen or ended.why,
    )


def _mean(trial: Ended) -> float | None:
    return DevScores(trial.scores, trial.weights, 0.0).mean if trial.scores else None


def _seconds(ended: Sequence[Ended]) -> float:
    return sum(trial.seconds for trial in ended)
