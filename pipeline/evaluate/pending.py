"""What is still to be asked of each model, what was answered before, and how long the rest will take."""

import time
from collections.abc import Sequence

from pipeline.contract import Attempt
from pipeline.evaluate.plan import ModelRequests, SuiteRequests
from pipeline.evaluate.prediction_cache import Prediction, PredictionCache, hash_tokens
from pipeline.metrics.degenerate import is_looping
from pipeline.models import greedy_decoding
from pipeline.records.heldout import HeldoutRecord

#: About so many answers are generated twice for the noise floor, in whole batches.
NOISE_RECORDS = 32


#: Text, tokens, whether it ended, and its share of the seconds.
Answered = tuple[str, int, bool, float]


class Pending:
    """What is known of each record's prediction, by place, and what is still to be computed."""

    def __init__(self, records: Sequence[HeldoutRecord], requests: ModelRequests, cache: PredictionCache) -> None:
        """Look up what `cache` knows of the `records` and the suites of `requests`."""
        self.ids, self.requests = [record.id for record in records], requests
        self._records = records
        self.prompts = [hash_tokens(tokens) for tokens in requests.prompts]
        self.references = [hash_tokens(tokens) for tokens in requests.completions]
        places = range(len(records))
        known = {place: cache.likelihood(self.prompts[place], self.references[place]) for place in places}
        cached = {place: cache.answer(self.prompts[place]) for place in places}
        self.nll = {place: value for place, value in known.items() if value is not None}
        self.answers = {
            place: (found.text, found.tokens, found.ended, found.seconds)
            for place, found in cached.items()
            if found is not None
        }
        self.without_nll = [place for place in places if place not in self.nll]
        self.without_answer = [place for place in places if place not in self.answers]
        self.suites = {
            suite_requests.suite.digest: cache.items(suite_requests.suite.digest) for suite_requests in requests.suites
        }
        self.again: list[int] = []
        """Places of the records that are answered twice: filled in by `answer_twice`."""

    def may_loop(self, place: int) -> bool:
        """Say whether an answer to a record may be a loop, as a reference is one."""
        return any(map(is_looping, self._records[place].references))

    def answer_batches(self, size: int) -> list[list[int]]:
        """Return the places of the records without an answer, in the batches in which they are generated."""
        prompts = [self.requests.prompts[place] for place in self.without_answer]
        return [
            [self.without_answer[index] for index in batch] for batch in greedy_decoding.answer_batches(prompts, size)
        ]

    def answer_twice(self) -> None:
        """Note which records are answered twice: the cheapest batches, whole, one at least."""
        chosen: list[list[int]] = []
        for batch in reversed(self.answer_batches(self.requests.key.setup.batch_size)):
            if chosen and sum(map(len, chosen)) + len(batch) > NOISE_RECORDS:
                break
            chosen.insert(0, batch)
        self.again = [place for batch in chosen for place in batch]

    def _items_missing(self) -> list[tuple[SuiteRequests, int]]:
        """Return the items of the suites that have no score yet, by their places."""
        return [
            (suite_requests, place)
            for suite_requests in self.requests.suites
            for place, item in enumerate(suite_requests.suite.items)
            if item.id not in self.suites[suite_requests.suite.digest]
        ]

    def requests_left(self) -> int:
        """Return how many likelihoods, answers and items of suites are asked for; a task of lm-eval is not counted."""
        return len(self.without_nll) + len(self.without_answer) + len(self.again) + len(self._items_missing())

    def is_done(self) -> bool:
        """Say whether nothing is left to ask: a task of lm-eval is known or not as a whole."""
        tasks = any(
            suite_requests.suite.task and not self.suites[suite_requests.suite.digest]
            for suite_requests in self.requests.suites
        )
        return not (self.requests_left() or tasks)

    def predictions(self) -> list[Prediction]:
        """Return the predictions of all records, now that their answers and likelihoods are there."""
        return [self._prediction(place) for place in range(len(self.ids))]

    def _prediction(self, place: int) -> Prediction:
        (text, tokens, ended, seconds), (nll_sum, nll_tokens) = self.answers[place], self.nll[place]
        return Prediction(
            id=self.ids[place],
            prompt_hash=self.prompts[place],
            text=text,
            tokens=tokens,
            ended=ended,
            seconds=seconds,
            nll_sum=nll_sum,
            nll_tokens=nll_tokens,
            reference_hash=self.references[place],
        )


class Pace:
    """Says how far one model's part is and how long all that is asked will take, and stops when the step is to stop."""

    def __init__(self, attempt: Attempt, asked: Sequence[Pending]) -> None:
        """Count what is asked of all models."""
        self._attempt = attempt
        self._left = sum(pending.requests_left() for pending in asked)
        self._computed = self._records = self._total = self._tokens = 0
        self._seconds = self._writing = 0.0
        self._phase = ""
        self._since = time.monotonic()

    def begin(self, pending: Pending) -> None:
        """Begin one model's part; raises `Interrupted`."""
        self._phase, self._records, self._total = pending.requests.role, 0, pending.requests_left()
        self._tell()
        self._attempt.check_stop()

    def resume(self) -> None:
        """Count no time that went by since the last batch: a model was loaded."""
        self._since = time.monotonic()

    def skip(self, records: int) -> None:
        """Count a batch that an earlier attempt had done."""
        self._left -= records
        self._records += records
        self._tell()

    def advance(self, records: int, tokens: int = 0) -> None:
        """Count `records` that were computed, and the `tokens` that were generated meanwhile; raises `Interrupted`."""
        took, self._since = time.monotonic() - self._since, time.monotonic()
        self._seconds += took
        self._writing += took if tokens else 0.0
        self._computed += records
        self._tokens += tokens
        self.skip(records)
        self._attempt.check_stop()

    def _tell(self) -> None:
        # What is only read takes far less time than an answer: alone it says nothing of how long the rest takes.
        known = self._tokens and self._computed
        self._attempt.progress(
            self._records,
            self._total,
            phase=self._phase,
            tokens_per_second=self._tokens / self._writing if self._tokens else None,
            eta_seconds=self._left * self._seconds / self._computed if known else None,
        )
