"""Which predictions of a model are cached and which are missing, and the ETA of computing those."""

import time
from collections.abc import Sequence

from pipeline.contract import Attempt
from pipeline.evaluate.plan import ModelRequests, SuiteRequests
from pipeline.evaluate.prediction_cache import Prediction, PredictionCache, hash_tokens
from pipeline.metrics.degenerate import is_looping
from pipeline.models import greedy_decoding
from pipeline.records.heldout import HeldoutRecord

#: Approximate number of answers generated twice for the noise floor, in whole batches.
NOISE_RECORDS = 32


#: Text, tokens, whether it ended, and its share of the batch's seconds.
Answered = tuple[str, int, bool, float]


class Pending:
    """The cached parts of a model's predictions by the record's index, and the missing ones."""

    def __init__(self, records: Sequence[HeldoutRecord], requests: ModelRequests, cache: PredictionCache) -> None:
        """Look up `records` and the suites of `requests` in `cache`."""
        self.ids, self.requests = [record.id for record in records], requests
        self._records = records
        self.prompts = [hash_tokens(tokens) for tokens in requests.prompts]
        self.references = [hash_tokens(tokens) for tokens in requests.completions]
        indices = range(len(records))
        known = {index: cache.likelihood(self.prompts[index], self.references[index]) for index in indices}
        cached = {index: cache.answer(self.prompts[index]) for index in indices}
        self.nll = {index: value for index, value in known.items() if value is not None}
        self.answers = {
            index: (found.text, found.tokens, found.ended, found.seconds)
            for index, found in cached.items()
            if found is not None
        }
        self.without_nll = [index for index in indices if index not in self.nll]
        self.without_answer = [index for index in indices if index not in self.answers]
        self.suites = {
            suite_requests.suite.digest: cache.items(suite_requests.suite.digest) for suite_requests in requests.suites
        }
        self.again: list[int] = []
        """Indices of the records that are answered twice; set by `answer_twice`."""

    def may_loop(self, index: int) -> bool:
        """Return whether a record's answer may loop, because a reference does."""
        return any(map(is_looping, self._records[index].references))

    def answer_batches(self, size: int) -> list[list[int]]:
        """Return the indices of the records without an answer, in batches for generation."""
        prompts = [self.requests.prompts[index] for index in self.without_answer]
        return [
            [self.without_answer[index] for index in batch] for batch in greedy_decoding.answer_batches(prompts, size)
        ]

    def answer_twice(self) -> None:
        """Select the records to answer twice: whole batches, the cheapest, at least one."""
        chosen: list[list[int]] = []
        for batch in reversed(self.answer_batches(self.requests.key.setup.batch_size)):
            if chosen and sum(map(len, chosen)) + len(batch) > NOISE_RECORDS:
                break
            chosen.insert(0, batch)
        self.again = [index for batch in chosen for index in batch]

    def _items_missing(self) -> list[tuple[SuiteRequests, int]]:
        """Return the suites' items that have no score yet, by index."""
        return [
            (suite_requests, index)
            for suite_requests in self.requests.suites
            for index, item in enumerate(suite_requests.suite.items)
            if item.id not in self.suites[suite_requests.suite.digest]
        ]

    def requests_left(self) -> int:
        """Return the number of missing likelihoods, answers and suite items; lm-eval tasks are not counted."""
        return len(self.without_nll) + len(self.without_answer) + len(self.again) + len(self._items_missing())

    def is_done(self) -> bool:
        """Return whether nothing is missing; an lm-eval task is cached as a whole or not at all."""
        tasks = any(
            suite_requests.suite.task and not self.suites[suite_requests.suite.digest]
            for suite_requests in self.requests.suites
        )
        return not (self.requests_left() or tasks)

    def predictions(self) -> list[Prediction]:
        """Return the predictions of all records; every answer and likelihood must be there."""
        return [self._prediction(index) for index in range(len(self.ids))]

    def _prediction(self, index: int) -> Prediction:
        (text, tokens, ended, seconds), (nll_sum, nll_tokens) = self.answers[index], self.nll[index]
        return Prediction(
            id=self.ids[index],
            prompt_hash=self.prompts[index],
            text=text,
            tokens=tokens,
            ended=ended,
            seconds=seconds,
            nll_sum=nll_sum,
            nll_tokens=nll_tokens,
            reference_hash=self.references[index],
        )


class Pace:
    """Reports the progress of one model's part and the ETA of all; raises `Interrupted` if the step is stopped."""

    def __init__(self, attempt: Attempt, models: Sequence[Pending]) -> None:
        """Count the missing predictions of all models."""
        self._attempt = attempt
        self._left = sum(pending.requests_left() for pending in models)
        self._computed = self._records = self._total = self._tokens = 0
        self._seconds = self._writing = 0.0
        self._phase = ""
        self._since = time.monotonic()

    def begin(self, pending: Pending) -> None:
        """Begin one model's part. Raises `Interrupted`."""
        self._phase, self._records, self._total = pending.requests.role, 0, pending.requests_left()
        self._tell()
        self._attempt.check_stop()

    def resume(self) -> None:
        """Restart the clock: time since the last batch, as for loading a model, is not counted."""
        self._since = time.monotonic()

    def skip(self, records: int) -> None:
        """Count `records` that an earlier attempt had computed."""
        self._left -= records
        self._records += records
        self._tell()

    def advance(self, records: int, tokens: int = 0) -> None:
        """Count computed `records` and generated `tokens`. Raises `Interrupted`."""
        took, self._since = time.monotonic() - self._since, time.monotonic()
        self._seconds += took
        self._writing += took if tokens else 0.0
        self._computed += records
        self._tokens += tokens
        self.skip(records)
        self._attempt.check_stop()

    def _tell(self) -> None:
        # Likelihoods take far less time than answers: without answers there is no ETA.
        known = self._tokens and self._computed
        self._attempt.progress(
            self._records,
            self._total,
            phase=self._phase,
            tokens_per_second=self._tokens / self._writing if self._tokens else None,
            eta_seconds=self._left * self._seconds / self._computed if known else None,
        )
