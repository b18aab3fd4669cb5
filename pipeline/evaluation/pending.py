"""What is still to be asked of one model, and what was answered before."""

from collections.abc import Sequence

from pipeline.dataset.heldout import HeldoutRecord
from pipeline.evaluation.plan import ModelRequests, SuiteRequests
from pipeline.evaluation.prediction_cache import Prediction, PredictionCache, hash_tokens
from pipeline.metrics.degenerate import is_looping
from pipeline.qlora import greedy_decoding

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
