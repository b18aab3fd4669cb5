"""
One model is asked: what is known is taken over, what is missing is computed in batches, with the model loaded once.

Where an earlier attempt was cut off does not show in the predictions: the batches are those of an attempt that was not.
With continuous batching every answer is a batch of its own in the log, and what is left is asked together.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.evaluation.batch_log import BatchLog, batch_id
from pipeline.evaluation.pending import Answered, Pending
from pipeline.evaluation.plan import ModelRequests, SuiteRequests
from pipeline.evaluation.prediction_cache import (
    PLAIN,
    ItemScore,
    Prediction,
    PredictionCache,
)
from pipeline.evaluation.suites import Suite
from pipeline.metrics.registry import token_f1
from pipeline.qlora import continuous_batching, generation, lm_eval, multiple_choice
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import chosen_device

_LOG = ".batches.jsonl"
#: Kinds of batches in which tokens are generated.
_GENERATED = ("answer", "again", "suite answer")


@dataclass(frozen=True)
class Result:
    """One model's predictions, in the order of the records."""

    predictions: list[Prediction]
    generated: int
    resumed: int
    seconds: float
    suites: dict[str, dict[str, ItemScore]]
    """What it got for each suite's items, by the suite's sha256."""
    again: dict[int, str] | None
    """Answers that were generated a second time, by the record's place; `None` if that was not asked for."""


def predict(attempt: Attempt, requests: ModelRequests, ids: Sequence[str], folder: Path, *, twice: bool) -> Result:
    """
    Return one model's predictions of the records `ids`, from the cache and earlier attempts where they are there.

    They are left in `folder`: all of them at the end, and each batch as it is computed. `twice` generates some of the
    answers again, if any are generated at all. Raises `Interrupted`; `StepFailed` if a likelihood is not finite, memory
    does not suffice or answers are missing; `CannotTrain` if the engine cannot ask the model, or if its folder is the
    user's own and holds another model (looked at only if something is missing: every file is read).
    """
    started = time.monotonic()
    digest, setup = requests.key.digest, requests.key.setup
    decoding = Decoding(setup.max_new_tokens, setup.repetition_penalty, setup.batch_size)
    pending = Pending(ids, requests, PredictionCache([attempt.root / attempt.spec.predictions / digest]))
    log = BatchLog(folder / f"{digest}{_LOG}", _earlier_logs(attempt, f"{folder.name}/{digest}{_LOG}"))
    again = pending.answered_twice(decoding.batch_size) if twice and pending.without_answer else None
    inference = _Inference(attempt, requests, pending, log, len(again or ()))
    try:
        if not pending.is_done():
            # What is computed now is kept under the model's id for good.
            requests.check_folder()
        inference.try_engine(decoding)
        inference.fill_likelihoods()
        inference.fill_answers(decoding)
        repeated = None if again is None else dict(zip(again, inference.repeat(again, decoding), strict=True))
        inference.fill_suites(decoding)
    finally:
        inference.close()
    if inference.resumed:
        words = (
            f"{inference.resumed} of its {len(pending.without_answer)} answers were there from an interrupted attempt"
        )
        sys.stderr.write(f"{requests.role}: {words}\n")
    ordered = pending.predictions()
    kept = [*ordered, *(score for scores in pending.suites.values() for score in scores.values())]
    durable.write_bytes(folder / f"{digest}.jsonl", b"".join(line.model_dump_json().encode() + b"\n" for line in kept))
    seconds = time.monotonic() - started
    return Result(ordered, len(pending.without_answer), inference.resumed, seconds, pending.suites, repeated)


def _earlier_logs(attempt: Attempt, name: str) -> list[Path]:
    """Return the logs called `name` of the run's earlier attempts at this step, in their order."""
    folders = (attempt.folder.with_name(f"{attempt.spec.step}-{number}") for number in range(1, attempt.spec.attempt))
    return [folder / name for folder in folders if (folder / name).is_file()]


class _Inference:
    """Computes what is missing, a batch at a time; the model is loaded once, and only if a batch needs it."""

    def __init__(
        self, attempt: Attempt, requests: ModelRequests, pending: Pending, log: BatchLog, repeated: int
    ) -> None:
        self._attempt, self._requests, self._pending, self._log = attempt, requests, pending, log
        total = len(pending.without_nll) + len(pending.without_answer) + repeated + pending.items_missing()
        self._pace = _Pace(attempt, requests.role, total)
        self._model: generation.AskedModel | None = None
        self._continuous = requests.key.setup.engine != PLAIN
        self.resumed = 0
        """Answers that an earlier attempt had computed."""

    def try_engine(self, decoding: Decoding) -> None:
        """Learn from one short answer, before the long pending, whether the engine can ask the model at all."""
        left = [place for place in self._pending.without_answer if self._known_alone("answer", place) is None]
        if self._continuous and left:
            shortest = min((self._requests.prompts[place] for place in left), key=len)
            short = replace(decoding, max_new_tokens=min(2, decoding.max_new_tokens))
            continuous_batching.prove(self._asked(), shortest, short, self._attempt.check_stop)

    def fill_likelihoods(self) -> None:
        """Compute the missing likelihoods, before the longer pending: a broken model shows here."""
        pending, requests = self._pending, self._requests
        pairs = [(requests.prompts[place], requests.completions[place]) for place in pending.without_nll]
        if not pairs:
            return
        batch_size, vocabulary = requests.key.setup.batch_size, generation.vocabulary(requests.folder)
        for batch in generation.likelihood_batches(pairs, batch_size, vocabulary):
            asked = [pairs[index] for index in batch]
            places = [pending.without_nll[index] for index in batch]
            found, _ = self._batch("likelihood", asked, partial(self._weigh, asked, places))
            for place, (nll, tokens) in zip(places, found, strict=True):
                pending.nll[place] = (nll, tokens)

    def fill_answers(self, decoding: Decoding) -> None:
        """Generate the missing answers."""
        if self._continuous:
            self.resumed += self._answer_continuously(
                "answer", self._pending.without_answer, decoding, self._pending.answers
            )
            return
        for batch in self._pending.answer_batches(decoding.batch_size):
            asked = [self._requests.prompts[place] for place in batch]
            found, known = self._batch("answer", asked, partial(self._generate, asked, decoding))
            self.resumed += len(batch) if known else 0
            for place, (text, tokens, ended, seconds) in zip(batch, found, strict=True):
                self._pending.answers[place] = (text, tokens, ended, seconds)

    def repeat(self, places: Sequence[int], decoding: Decoding) -> list[str]:
        """Generate the answers to some records again, in the batches of the first time if it had any; return texts."""
        if self._continuous:
            again: dict[int, Answered] = {}
            self._answer_continuously("again", places, decoding, again)
            return [again[place][0] for place in places]
        chosen = set(places)
        texts: list[str] = []
        for batch in self._pending.answer_batches(decoding.batch_size):
            if chosen.issuperset(batch):
                asked = [self._requests.prompts[place] for place in batch]
                found, _ = self._batch("again", asked, partial(self._generate, asked, decoding))
                texts += [text for text, *_ in found]
        return texts

    def fill_suites(self, decoding: Decoding) -> None:
        """Score the items of the suites that have no score yet."""
        for suite_requests in self._requests.suites:
            known = self._pending.suites[suite_requests.suite.digest]
            if suite_requests.suite.task:
                if not known:
                    self._run_task(suite_requests.suite, decoding)
                continue
            missing = [place for place, item in enumerate(suite_requests.suite.items) if item.id not in known]
            free = [place for place in missing if not suite_requests.suite.items[place].choices]
            chosen = [place for place in missing if suite_requests.suite.items[place].choices]
            self._choose(suite_requests, chosen, decoding.batch_size)
            self._answer_freely(suite_requests, free, decoding)

    def close(self) -> None:
        """Free the model's memory."""
        self._log.close()
        if self._model is not None:
            generation.close_model(self._model)

    def _choose(self, suite_requests: SuiteRequests, places: Sequence[int], size: int) -> None:
        questions = [(suite_requests.prompts[place], suite_requests.answers[place]) for place in places]
        if not questions:
            return
        for batch in multiple_choice.choice_batches(questions, size, generation.vocabulary(self._requests.folder)):
            asked = [questions[index] for index in batch]
            found, _ = self._batch("choice", asked, partial(self._choices, asked))
            for index, losses in zip(batch, found, strict=True):
                item = suite_requests.suite.items[places[index]]
                self._note(suite_requests.suite, item.id, item.category, item.score_choice(losses))

    def _choices(self, asked: Sequence[multiple_choice.Question]) -> list[list[float]]:
        found = multiple_choice.choice_likelihoods(self._asked(), asked)
        if not all(math.isfinite(loss) for losses in found for loss in losses):
            message = f"the {self._requests.role}'s likelihood of a general suite's answer is not a finite number"
            raise StepFailed(message, "the model is broken: train again, with a lower train.learning_rate")
        return found

    def _answer_freely(self, suite_requests: SuiteRequests, places: Sequence[int], decoding: Decoding) -> None:
        if not places:
            return
        longest = max(len(tokens) for place in places for tokens in suite_requests.answers[place])
        # The track's limit is made for its own answers. As `prepare` does it, a multiple of 16.
        roomy = replace(decoding, max_new_tokens=-(-longest // 16) * 16)
        prompts = [suite_requests.prompts[place] for place in places]
        for batch in generation.answer_batches(prompts, roomy.batch_size):
            asked = [prompts[index] for index in batch]
            found, _ = self._batch("suite answer", asked, partial(self._generate, asked, roomy))
            for index, (text, *_) in zip(batch, found, strict=True):
                item = suite_requests.suite.items[places[index]]
                self._note(suite_requests.suite, item.id, item.category, token_f1(text, item.references))

    def _run_task(self, suite: Suite, decoding: Decoding) -> None:
        """Score a task of lm-eval, all of it at once."""
        found, _ = self._batch(
            "task", [suite.task], lambda: [lm_eval.run_task(self._asked(), suite.task, decoding.batch_size)]
        )
        for item, score in found[0].items():
            self._note(suite, item, suite.task, score)

    def _note(self, suite: Suite, item: str, category: str, score: float) -> None:
        noted = ItemScore(suite=suite.digest, item=item, category=category, score=score)
        self._pending.suites[suite.digest][item] = noted

    def _batch(
        self, kind: str, asked: Sequence[Any], compute: Callable[[], Sequence[Any]]
    ) -> tuple[Sequence[Any], bool]:
        """Return a batch's values, one for each that is asked, and whether an earlier attempt had computed them."""
        name = batch_id(kind, asked)
        known = self._log.find(name, len(asked))
        if known is not None:
            self._pace.skip(len(asked))
            return known, True
        found = compute()
        self._log.add(name, found)
        tokens = sum(row[1] for row in found) if kind in _GENERATED else 0
        self._pace.advance(len(asked), tokens)
        return found, False

    def _known_alone(self, kind: str, place: int) -> Answered | None:
        """Return what an earlier attempt logged of an answer that was a batch of its own."""
        known = self._log.find(batch_id(kind, [self._requests.prompts[place]]), 1)
        if known is None:
            return None
        text, tokens, ended, seconds = known[0]
        return (text, tokens, ended, seconds)

    def _answer_continuously(
        self, kind: str, places: Sequence[int], decoding: Decoding, found: dict[int, Answered]
    ) -> int:
        """Add the answers to the records `places` to `found`; return how many an earlier attempt had computed."""
        known = {place: row for place in places if (row := self._known_alone(kind, place)) is not None}
        self._pace.skip(len(known))
        found |= known
        left = [place for place in places if place not in known]
        counted: set[int] = set()

        def keep(index: int, answer: generation.Answer | None, seconds: float) -> None:
            place = left[index]
            name = batch_id(kind, [self._requests.prompts[place]])
            if answer is None:
                self._log.add(name, [])
                del found[place]
                return
            found[place] = (*answer, seconds)
            self._log.add(name, [found[place]])
            self._pace.advance(int(place not in counted), answer.tokens)
            counted.add(place)

        if left:
            prompts = [self._requests.prompts[place] for place in left]
            continuous_batching.answers(self._asked(), prompts, decoding, keep, self._attempt.check_stop)
        return len(known)

    def _generate(self, asked: Sequence[generation.Tokens], decoding: Decoding) -> list[Answered]:
        """Return text, tokens, whether it ended, and its share of the batch's seconds, of each answer."""
        model = self._asked()
        started = time.monotonic()
        found = generation.answers(model, asked, decoding, self._attempt.check_stop)
        share = (time.monotonic() - started) / len(found)
        return [(*answer, share) for answer in found]

    def _weigh(self, asked: Sequence[Any], places: Sequence[int]) -> list[generation.Likelihood]:
        found = generation.likelihoods(self._asked(), asked)
        for place, likelihood in zip(places, found, strict=True):
            if not math.isfinite(likelihood.nll):
                name = self._pending.ids[place][:12]
                message = f"the {self._requests.role}'s likelihood of record {name} is not a finite number"
                raise StepFailed(message, "the model is broken: train again, with a lower train.learning_rate")
        return found

    def _asked(self) -> generation.AskedModel:
        if self._model is None:
            self._model = generation.open_model(self._requests.folder, self._requests.tokenizer, chosen_device())
        return self._model


class _Pace:
    """Says how far one model's part is, and stops between batches when the step is to stop."""

    def __init__(self, attempt: Attempt, phase: str, total: int) -> None:
        """Begin a phase of `total` records; raises `Interrupted`."""
        self._attempt, self._phase, self._total = attempt, phase, total
        self._started = time.monotonic()
        self._generating_since: float | None = None
        self._done = self._skipped = self._tokens = 0
        attempt.check_stop()
        attempt.progress(0, total, phase=phase)

    def skip(self, records: int) -> None:
        """Count `records` that an earlier attempt had done."""
        self._done += records
        self._skipped += records
        self._attempt.progress(self._done, self._total, phase=self._phase)

    def advance(self, records: int, tokens: int) -> None:
        """Count one batch of `records` in which `tokens` were generated; raises `Interrupted`."""
        now = time.monotonic()
        rate = None
        if tokens:
            self._tokens += tokens
            rate = self._tokens / max(now - (self._generating_since or self._started), 1e-9)
        else:
            self._generating_since = now
        self._done += records
        left = (now - self._started) / (self._done - self._skipped) * (self._total - self._done)
        self._attempt.progress(self._done, self._total, phase=self._phase, tokens_per_second=rate, eta_seconds=left)
        self._attempt.check_stop()
