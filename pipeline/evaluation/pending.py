"""What is still to be asked of each model, what was answered before, and how long the rest will take."""

import time
from collections.abc import Sequence
from typing import Literal

from pipeline.contract import Attempt
from pipeline.dataset.heldout import HeldoutRecord
from pipeline.evaluation.plan import ModelRequests, SuiteRequests
from pipeline.evaluation.prediction_cache import Prediction, PredictionCache, hash_tokens
from pipeline.metrics.degenerate import is_looping
from pipeline.qlora import greedy_decoding

#: About so many answers are generated twice for the noise floor, in whole batches.
NOISE_RECORDS = 32


#: Text, tokens, whether it ended, and its share of the seconds.
Answered = tuple[str, int, bool, float]
#: What takes time: a token that is read, an answer that is written.
Kind = Literal["read", "written"]


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

    def tokens_to_read(self) -> int:
        """Return how many tokens have to be read for likelihoods: those of references and of choices."""
        references = sum(len(self.requests.prompts[at]) + len(self.requests.completions[at]) for at in self.without_nll)
        return references + sum(
            len(asked.prompts[place]) + sum(map(len, asked.answers[place]))
            for asked, place in self._items_missing()
            if asked.suite.items[place].choices
        )

    def answers_to_write(self) -> int:
        """Return how many answers have to be generated, those to suites among them."""
        free = sum(not asked.suite.items[place].choices for asked, place in self._items_missing())
        return len(self.without_answer) + len(self.again) + free

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
        self._left: dict[Kind, int] = {
            "read": sum(pending.tokens_to_read() for pending in asked),
            "written": sum(pending.answers_to_write() for pending in asked),
        }
        self._done: dict[Kind, int] = {"read": 0, "written": 0}
        self._seconds: dict[Kind, float] = {"read": 0.0, "written": 0.0}
        self._records = self._total = self._tokens = 0
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

    def skip(self, records: int, read: int) -> None:
        """Count a batch that an earlier attempt had done: `read` tokens, or, without any, answers."""
        self._left["read" if read else "written"] -= read or records
        self._records += records
        self._tell()

    def advance(self, kind: Kind, records: int, tokens: int) -> None:
        """Count `records` that were read, or answered, with the tokens that took; raises `Interrupted`."""
        now = time.monotonic()
        amount = tokens if kind == "read" else records
        self._left[kind] -= amount
        self._done[kind] += amount
        self._seconds[kind] += now - self._since
        self._since = now
        self._records += records
        self._tokens += tokens if kind == "written" else 0
        self._tell()
        self._attempt.check_stop()

    def _tell(self) -> None:
        speed = self._tokens / self._seconds["written"] if self._tokens else None
        known = all(self._done[kind] or not left for kind, left in self._left.items())
        left = sum(self._left[kind] * self._seconds[kind] / self._done[kind] for kind in self._left if self._done[kind])
        self._attempt.progress(
            self._records,
            self._total,
            phase=self._phase,
            tokens_per_second=speed,
            eta_seconds=left if known else None,
        )
