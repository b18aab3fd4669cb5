"""
One model is asked: what is known is taken over, what is missing is computed in batches, with the model loaded once.

Where an earlier attempt was cut off does not show in the predictions: the batches are those of an attempt that was not.
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate import lm_eval
from pipeline.evaluate.batch_log import BatchLog, batch_id
from pipeline.evaluate.engines.engine import Engine
from pipeline.evaluate.engines.in_step import InStep
from pipeline.evaluate.engines.vllm import Vllm
from pipeline.evaluate.engines.vllm_server import Served, Server
from pipeline.evaluate.pending import Answered, Pace, Pending
from pipeline.evaluate.plan import SuiteRequests
from pipeline.evaluate.prediction_cache import PLAIN, ItemScore, Prediction
from pipeline.evaluate.suites import Suite
from pipeline.metrics.degenerate import is_looping
from pipeline.metrics.registry import token_f1
from pipeline.models import generation, greedy_decoding, multiple_choice
from pipeline.models.generation import Decoding
from pipeline.models.loading import chosen_device

_LOG = ".batches.jsonl"


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


def predict(attempt: Attempt, pending: Pending, folder: Path, pace: Pace) -> Result:
    """
    Return one model's predictions, from the cache and earlier attempts where they are there.

    They are left in `folder`: all of them at the end, and each batch as it is computed. Raises `Interrupted`;
    `StepFailed` if memory does not suffice; `CannotTrain` if a likelihood is not finite, the model cannot be asked, or
    its folder is the user's own and holds another model (looked at only if something is missing: every file is read).
    """
    started = time.monotonic()
    requests = pending.requests
    digest, setup = requests.key.digest, requests.key.setup
    decoding = Decoding(setup.max_new_tokens, setup.repetition_penalty, setup.batch_size, requests.window)
    log = BatchLog(folder / f"{digest}{_LOG}", attempt.earlier(f"{folder.name}/{digest}{_LOG}"))
    pace.begin(pending)
    inference = _Inference(attempt, pending, log, pace)
    try:
        if not pending.is_done():
            # What is computed now is kept under the model's id for good.
            requests.check_folder()
        inference.fill_likelihoods()
        inference.fill_answers(decoding)
        repeated = inference.repeat(decoding) if pending.again else None
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


class _Inference:
    """Computes what is missing, a batch at a time; the model is loaded once, and only if a batch needs it."""

    def __init__(self, attempt: Attempt, pending: Pending, log: BatchLog, pace: Pace) -> None:
        self._attempt, self._pending, self._log, self._pace = attempt, pending, log, pace
        self._requests = pending.requests
        self._opened: Engine | None = None
        self.resumed = 0
        """Answers that an earlier attempt had computed."""

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
        for batch in self._pending.answer_batches(decoding.batch_size):
            found, known = self._answers("answer", batch, decoding)
            self.resumed += len(batch) if known else 0
            for place, (text, tokens, ended, seconds) in zip(batch, found, strict=True):
                self._pending.answers[place] = (text, tokens, ended, seconds)

    def repeat(self, decoding: Decoding) -> dict[int, str]:
        """Generate the answers to some records again, in the batches of the first time; return texts by place."""
        chosen = set(self._pending.again)
        texts: dict[int, str] = {}
        for batch in self._pending.answer_batches(decoding.batch_size):
            if chosen.issuperset(batch):
                found, _ = self._answers("again", batch, decoding)
                texts.update(zip(batch, (text for text, *_ in found), strict=True))
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
        if self._opened is not None:
            self._opened.close()

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
        found = self._engine().choices(asked)
        if not all(math.isfinite(loss) for losses in found for loss in losses):
            message = f"the {self._requests.role}'s likelihood of a general suite's answer is not a finite number"
            raise CannotTrain(message, "the model is broken: train again, with a lower train.learning_rate")
        return found

    def _answer_freely(self, suite_requests: SuiteRequests, places: Sequence[int], decoding: Decoding) -> None:
        if not places:
            return
        # The track's limit is made for its own answers.
        roomy = replace(decoding, max_new_tokens=max(map(suite_requests.new_tokens, places)))
        prompts = [suite_requests.prompts[place] for place in places]
        for batch in greedy_decoding.answer_batches(prompts, roomy.batch_size):
            asked = [prompts[index] for index in batch]
            items = [suite_requests.suite.items[places[index]] for index in batch]
            may_loop = {row for row, item in enumerate(items) if any(map(is_looping, item.references))}
            compute = partial(self._generate, asked, roomy, may_loop)
            found, _ = self._batch("suite answer", asked, compute, writes=True)
            for item, (text, *_) in zip(items, found, strict=True):
                score = item.score_text(text) if item.words else token_f1(text, item.references)
                self._note(suite_requests.suite, item.id, item.category, score, text)

    def _run_task(self, suite: Suite, decoding: Decoding) -> None:
        """Score a task of lm-eval, all of it at once."""
        name = batch_id("task", [suite.task])
        found = self._log.find(name, 1)
        if found is None:
            found = [lm_eval.run_task(self._loaded(), suite.task, decoding.batch_size)]
            self._log.add(name, found)
            self._pace.resume()
        for item, score in found[0].items():
            self._note(suite, item, suite.task, score)

    def _note(self, suite: Suite, item: str, category: str, score: float, text: str | None = None) -> None:
        noted = ItemScore(suite=suite.digest, item=item, category=category, score=score, text=text)
        self._pending.suites[suite.digest][item] = noted

    def _answers(self, kind: str, batch: Sequence[int], decoding: Decoding) -> tuple[Sequence[Any], bool]:
        asked = [self._requests.prompts[place] for place in batch]
        may_loop = {row for row, place in enumerate(batch) if self._pending.may_loop(place)}
        return self._batch(kind, asked, partial(self._generate, asked, decoding, may_loop), writes=True)

    def _batch(
        self, kind: str, asked: Sequence[Any], compute: Callable[[], Sequence[Any]], *, writes: bool = False
    ) -> tuple[Sequence[Any], bool]:
        """
        Return a batch's values, one for each that is asked, and whether an earlier attempt had computed them.

        Where `compute` writes answers, it says itself how far it is.
        """
        name = batch_id(kind, asked)
        known = self._log.find(name, len(asked))
        if known is not None:
            self._pace.skip(len(asked))
            return known, True
        found = compute()
        self._log.add(name, found)
        if not writes:
            self._pace.advance(len(asked))
        return found, False

    def _generate(
        self, asked: Sequence[generation.Tokens], decoding: Decoding, may_loop: Collection[int]
    ) -> list[Answered]:
        """Return text, tokens, whether it ended, and its share of the batch's seconds, of each answer."""
        engine = self._engine()
        started = time.monotonic()
        told = (0, 0)

        def watch(answers: int, tokens: int) -> None:
            nonlocal told
            self._pace.advance(answers - told[0], tokens - told[1])
            told = (answers, tokens)

        found = engine.answers(asked, decoding, watch, may_loop)
        watch(len(found), sum(answer.tokens for answer in found))
        share = (time.monotonic() - started) / len(found)
        return [(*answer, share) for answer in found]

    def _weigh(self, asked: Sequence[Any], places: Sequence[int]) -> list[generation.Likelihood]:
        found = self._engine().likelihoods(asked)
        for place, likelihood in zip(places, found, strict=True):
            if not math.isfinite(likelihood.nll):
                name = self._pending.ids[place][:12]
                message = f"the {self._requests.role}'s likelihood of record {name} is not a finite number"
                raise CannotTrain(message, "the model is broken: train again, with a lower train.learning_rate")
        return found

    def _engine(self) -> Engine:
        if self._opened is None:
            if self._requests.key.setup.engine == PLAIN:
                model = generation.open_model(self._requests.folder, self._requests.tokenizer, chosen_device())
                self._opened = InStep(model)
            else:
                self._opened = self._serve()
            self._pace.resume()
        return self._opened

    def _loaded(self) -> generation.AskedModel:
        """Return the model itself: a task of lm-eval is not run by another engine."""
        engine = self._engine()
        if not isinstance(engine, InStep):
            raise CannotTrain("a task of lm-eval runs on transformers alone", 'set evaluate.vllm = ""')
        return engine.model

    def _serve(self) -> Vllm:
        requests, rows = self._requests, self._requests.key.setup.batch_size
        place = self._attempt.folder / f"vllm-{requests.role.replace(' ', '-')}"
        served = Served(requests.folder, requests.key.model_id, requests.longest(), rows)
        server = Server(self._attempt.config.evaluate.vllm, served, place)
        ends = generation.end_tokens(requests.folder, requests.tokenizer)
        engine = Vllm(server, requests.tokenizer, ends, rows, self._attempt.check_stop)
        # Before it is ready: what goes wrong until then has to stop it, too.
        self._opened = engine
        server.wait(self._attempt.check_stop)
        return engine
