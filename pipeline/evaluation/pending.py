"""What is still to be asked of one model, and what was answered before."""

from collections.abc import Sequence

from pipeline.evaluation.plan import ModelRequests
from pipeline.evaluation.prediction_cache import Prediction, PredictionCache, hash_tokens
from pipeline.qlora import generation

#: About so many answers are generated twice for the noise floor, in whole batches.
NOISE_RECORDS = 32


#: Text, tokens, whether it ended, and its share of the seconds.
Answered = tuple[str, int, bool, float]


class Pending:
    """What is known of each record's prediction, by place, and what is still to be computed."""

    def __init__(self, ids: Sequence[str], requests: ModelRequests, cache: PredictionCache) -> None:
        """Look up what `cache` knows of the records `ids` and the suites of `requests`."""
        self.ids, self._requests = ids, requests
        self.prompts = [hash_tokens(tokens) for tokens in requests.prompts]
        self.references = [hash_tokens(tokens) for tokens in requests.completions]
        places = range(len(ids))
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

    def answer_batches(self, size: int) -> list[list[int]]:
        """Return the places of the records without an answer, in the batches in which they are generated."""
        prompts = [self._requests.prompts[place] for place in self.without_answer]
        return [[self.without_answer[index] for index in batch] for batch in generation.answer_batches(prompts, size)]

    def answered_twice(self, size: int) -> list[int]:
        """Return the places of the records that are generated twice: the cheapest batches, whole, one at least."""
        chosen: list[list[int]] = []
        for batch in reversed(self.answer_batches(size)):
            if chosen and sum(map(len, chosen)) + len(batch) > NOISE_RECORDS:
                break
            chosen.insert(0, batch)
        return [place for batch in chosen for place in batch]

    def items_missing(self) -> int:
        """Return how many items of the suites have no score yet."""
        return sum(
            item.id not in self.suites[suite_requests.suite.digest]
            for suite_requests in self._requests.suites
            for item in suite_requests.suite.items
        )

    def is_done(self) -> bool:
        """Say whether nothing is left to ask: a task of lm-eval is known or not as a whole."""
        tasks = any(
            suite_requests.suite.task and not self.suites[suite_requests.suite.digest]
            for suite_requests in self._requests.suites
        )
        return not (self.without_nll or self.without_answer or self.items_missing() or tasks)

    def predictions(self) -> list[Prediction]:
        """Return the predictions of all records, now that their answers and likelihoods are there."""
        return [self._prediction(place) for place in range(len(self.ids))]

    def _prediction(self, place: int) -> Prediction:
        (text, tokens, ended, seconds), (nll_sum, nll_tokens) = self.answers[place], self.nll[place]
        return Prediction(
            id=self.ids[place], prompt_hash=self.prompts[place], text=text, tokens=tokens, ended=ended,
            seconds=seconds, nll_sum=nll_sum, nll_tokens=nll_tokens, reference_hash=self.references[place],
        )  # fmt: skip
