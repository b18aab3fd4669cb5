"""What candidate and champion are asked: the same records and suites, tokenised for each before either is loaded."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.artifacts import Model
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError
from pipeline.evaluate.engines import vllm_server
from pipeline.evaluate.prediction_cache import PLAIN, PredictionKey, Setup, hash_tokens
from pipeline.evaluate.suites import Suite
from pipeline.models import auto_batch_size, generation
from pipeline.models.generation import Decoding
from pipeline.models.loading import OutOfMemory, chosen_device, load_tokenizer
from pipeline.models.manifest import model_id
from pipeline.models.prompt import Format, completion_ids, fold, prompt_ids
from pipeline.models.sizes import read_window
from pipeline.models.trained_ids import trained_ids
from pipeline.records.heldout import HeldoutRecord
from pipeline.words import count

#: The request whose prompt tokens stand for a model's template.
_PROBE = fold("Repeat the word.", "word")
_FOUND_NAME = "batch-size.json"
#: Requests at once under vLLM, which makes its batches itself.
_ROWS_VLLM = 32
#: Room for the sentence that a question of two words is answered with.
_QUESTION_TOKENS = 32


Role = Literal["candidate", "champion", "base model"]


@dataclass(frozen=True)
class SuiteRequests:
    """A suite as one model is asked it."""

    suite: Suite
    prompts: list[list[int]] = field(default_factory=list)
    """Tokens of each item's question."""
    answers: list[list[list[int]]] = field(default_factory=list)
    """Tokens of each item's choices, or of its references, each with the one that ends it."""

    def new_tokens(self, place: int) -> int:
        """Return how long the answer to an item may be, in tokens: of a free one, as `prepare` does it, in sixteens."""
        item, longest = self.suite.items[place], max(map(len, self.answers[place]))
        if item.choices:
            return longest
        return max(_QUESTION_TOKENS if item.words else 0, -(-longest // auto_batch_size.ROUND) * auto_batch_size.ROUND)


@dataclass(frozen=True)
class ModelRequests:
    """What one model is asked, and what its answers will be kept under."""

    role: Role
    folder: Path
    tokenizer: Any
    key: PredictionKey
    prompts: list[list[int]]
    completions: list[list[int]]
    """Tokens of each record's reference, with the one that ends it."""
    suites: tuple[SuiteRequests, ...] = ()
    users_own: bool = False
    """Whether the folder is the user's own, without a manifest: it may hold another model since it was hashed."""

    @property
    def window(self) -> int:
        """The most tokens that the model was made for, prompt and answer together."""
        # vLLM generates a token after what it only reads, too.
        return read_window(self.folder) - (self.key.setup.engine != PLAIN)

    def longest(self) -> int:
        """Return the most tokens of a prompt with its answer, or with a reference and one token after it."""
        new, window = self.key.setup.max_new_tokens, self.window
        pairs = zip(self.prompts, self.completions, strict=True)
        of_records = [
            max(min(len(prompt) + new, window), len(prompt) + len(completion) + 1) for prompt, completion in pairs
        ]
        of_items = [
            max(map(len, suite.prompts)) + max(map(suite.new_tokens, range(len(suite.prompts))))
            for suite in self.suites
            if suite.prompts
        ]
        return max([*of_records, *(tokens + auto_batch_size.ROUND for tokens in of_items)])

    def check_folder(self) -> None:
        """Raise `CannotTrain` if the folder is the user's own and does not hold the model of the key any more."""
        if not self.users_own:
            return
        try:
            found = model_id(self.folder)
        except DropforgeError as error:
            raise CannotTrain(error.message, error.hint) from error
        if found != self.key.model_id:
            message = f"the base model {self.folder} is not the one that the run trained from"
            raise CannotTrain(message, "restore its files, then go on: dropforge retry RUN")


@dataclass(frozen=True)
class EvalPlan:
    """What both models are asked, and which held-out records that leaves."""

    records: list[HeldoutRecord]
    candidate: ModelRequests
    champion: ModelRequests
    base: ModelRequests | None
    """The suites alone; `None` if the base model is the champion, there is no suite, or it cannot be asked so."""
    too_long: int
    """Records that are left out because they do not fit into a window."""
    seen_by_champion: int
    """Records that are left out because the champion was trained on them or on near ones."""
    seen_by_candidate: int
    """Records that are asked though the candidate was trained on them."""


@dataclass(frozen=True)
class _AskedModel:
    """Which model is asked as what, in which format."""

    role: Role
    model_id: str
    folder: Path
    format: Format
    users_own: bool = False


def make_plan(
    attempt: Attempt, records: list[HeldoutRecord], suites: Sequence[Suite], decoding: Decoding, folder: Path
) -> EvalPlan:
    """
    Return what both models are asked; with a batch size of 0 in `decoding` it is found, and kept in `folder`.

    What a model cannot be asked fairly is left out for both. Raises `CannotTrain` if nothing is left, or if there is no
    vLLM where the settings want one.
    """
    # A template may hold today's date: everything is tokenised before the long work.
    one, other = _asked_models(attempt)
    kept = _unseen(records, trained_ids(other.folder))
    asked = [_requests(model, kept, suites, decoding) for model in (one, other)]
    settings = attempt.config.evaluate
    if settings.vllm:
        engine = f"vllm {vllm_server.read_version(settings.vllm)}"
        asked = [_with_setup(requests, engine=engine) for requests in asked]
    kept, (candidate, champion), too_long = _leave_out_too_long(kept, asked)
    size = _noted_size(attempt, folder.name, decoding.batch_size)
    if not size and settings.vllm:
        size = _ROWS_VLLM
    elif not size:
        size = auto_batch_size.batch_size(
            candidate.folder, candidate.tokenizer, candidate.prompts, decoding.max_new_tokens
        )
        durable.write_json(folder / _FOUND_NAME, size)
    candidate, champion = (_with_setup(requests, batch_size=size) for requests in (candidate, champion))
    own = trained_ids(one.folder)
    return EvalPlan(
        kept,
        candidate,
        champion,
        _base_requests(attempt, candidate, other, decoding),
        too_long=too_long,
        seen_by_champion=len(records) - len(kept) - too_long,
        seen_by_candidate=sum(record.id in own for record in kept),
    )


def _asked_models(attempt: Attempt) -> tuple[_AskedModel, _AskedModel]:
    model, champion = attempt.load(Model), attempt.spec.champion
    # A merged model's own template renders the format that it was trained in. The base model, before any training, is
    # asked in the format that the candidate was trained in.
    own: Format = "chat"
    is_base = champion.model_id == model.base_model_id
    base_format: Format = model.format if is_base else own
    return (
        _AskedModel("candidate", model.model_id, attempt.path(model.folder), own),
        _AskedModel("champion", champion.model_id, attempt.path(champion.path), base_format, users_own=is_base),
    )


def _base_requests(
    attempt: Attempt, candidate: ModelRequests, champion: _AskedModel, decoding: Decoding
) -> ModelRequests | None:
    """Return what the base model is asked beside a trained champion: the candidate's items of the suites."""
    model, folder = attempt.load(Model), Path(attempt.config.base_model)
    if champion.model_id == model.base_model_id or not candidate.suites:
        return None
    if attempt.config.base_model_id != model.base_model_id or not (folder / "config.json").is_file():
        say_base_is_not_asked("it is not there")
        return None
    asked_model = _AskedModel("base model", model.base_model_id, folder, model.format, users_own=True)
    try:
        asked = _requests(asked_model, [], [suite_requests.suite for suite_requests in candidate.suites], decoding)
    except Exception as error:  # noqa: BLE001 - libraries raise errors of every kind at a damaged folder
        say_base_is_not_asked(f"it is damaged: {error}")
        return None
    setup = candidate.key.setup
    base = _with_setup(asked, batch_size=setup.batch_size, engine=setup.engine)
    if base.key.setup != setup:
        say_base_is_not_asked("it would be asked in another way than the candidate")
        return None
    return base


def say_base_is_not_asked(why: str) -> None:
    """Say on standard error why the base model has no scores, in one line: the run goes on without them."""
    sys.stderr.write(f"the base model is not asked the general suites: {' '.join(why.split())}\n")


def _unseen(records: list[HeldoutRecord], trained: frozenset[str]) -> list[HeldoutRecord]:
    """Leave out what the champion was trained on, or on a near copy: it would win there by heart."""
    kept = [record for record in records if not record.is_known(trained)]
    if not kept:
        message = "the champion was trained on every held-out record, or on near copies"
        raise CannotTrain(message, "drop held-out records that no model has seen, into the track's heldout folder")
    if len(kept) < len(records):
        sys.stderr.write(f"left out: {count(len(records) - len(kept), 'held-out record')} that the champion knows\n")
    return kept


def _requests(
    model: _AskedModel, records: Sequence[HeldoutRecord], suites: Sequence[Suite], decoding: Decoding
) -> ModelRequests:
    tokenizer: Any = load_tokenizer(model.folder)
    stops = generation.end_tokens(model.folder, tokenizer)
    setup = Setup(
        template=hash_tokens(prompt_ids(tokenizer, model.format, _PROBE)),
        max_new_tokens=decoding.max_new_tokens,
        repetition_penalty=decoding.repetition_penalty,
        batch_size=decoding.batch_size,
        **generation.arithmetic(model.folder, chosen_device()),
    )

    def answer(content: str, output: str) -> list[int]:
        return completion_ids(tokenizer, model.format, content, output, stops)

    def suite_requests(suite: Suite) -> SuiteRequests:
        return SuiteRequests(
            suite=suite,
            prompts=[prompt_ids(tokenizer, model.format, item.question) for item in suite.items],
            answers=[
                # How likely the end is after a choice says little of what the model knows.
                [answer(item.question, choice)[:-1] for choice in item.choices]
                or [answer(item.question, reference) for reference in item.references]
                for item in suite.items
            ],
        )

    return ModelRequests(
        role=model.role,
        folder=model.folder,
        tokenizer=tokenizer,
        key=PredictionKey(model_id=model.model_id, setup=setup),
        prompts=[prompt_ids(tokenizer, model.format, record.content) for record in records],
        completions=[answer(record.content, record.output) for record in records],
        suites=tuple(map(suite_requests, suites)),
        users_own=model.users_own,
    )


def _leave_out_too_long(
    records: list[HeldoutRecord], both: Sequence[ModelRequests]
) -> tuple[list[HeldoutRecord], list[ModelRequests], int]:
    """
    Leave out what does not fit into a model's window with its answer, for both models; return how many records.

    Training leaves such rows out too. Asked all the same, one long document would fail every run of the track.
    """
    window = min(requests.window for requests in both)

    def fits(requests: ModelRequests, place: int) -> bool:
        return len(requests.prompts[place]) + len(requests.completions[place]) <= window

    kept = [place for place in range(len(records)) if all(fits(requests, place) for requests in both)]
    too_long = len(records) - len(kept)
    if not kept:
        message = f"no held-out record fits into the window of {window} tokens with its answer"
        raise CannotTrain(message, "drop shorter records, or use a base model with a longer window")
    if too_long:
        left_out = count(too_long, "held-out record")
        sys.stderr.write(f"left out: {left_out} longer than {window} tokens with the answer\n")
    items = [
        _fitting_items([requests.suites[number] for requests in both], window) for number in range(len(both[0].suites))
    ]
    shorter = [
        replace(
            requests,
            prompts=[requests.prompts[n] for n in kept],
            completions=[requests.completions[n] for n in kept],
            suites=tuple(_cut(asked, places) for asked, places in zip(requests.suites, items, strict=True)),
        )
        for requests in both
    ]
    return [records[n] for n in kept], shorter, too_long


def _fitting_items(suites: Sequence[SuiteRequests], window: int) -> list[int]:
    """Return the places of a suite's items that fit into the window with their answer."""
    suite = suites[0].suite

    def fits(suite_requests: SuiteRequests, place: int) -> bool:
        return len(suite_requests.prompts[place]) + suite_requests.new_tokens(place) <= window

    kept = [place for place in range(len(suite.items)) if all(fits(suite_requests, place) for suite_requests in suites)]
    if len(kept) < len(suite.items):
        left_out = count(len(suite.items) - len(kept), "item")
        sys.stderr.write(f"left out: {left_out} of {suite.name} longer than the window\n")
    return kept


def _cut(suite_requests: SuiteRequests, places: Sequence[int]) -> SuiteRequests:
    return SuiteRequests(
        suite=replace(suite_requests.suite, items=tuple(suite_requests.suite.items[place] for place in places)),
        prompts=[suite_requests.prompts[place] for place in places],
        answers=[suite_requests.answers[place] for place in places],
    )


def _with_setup(requests: ModelRequests, **changed: Any) -> ModelRequests:
    setup = requests.key.setup.model_copy(update=changed)
    return replace(requests, key=requests.key.model_copy(update={"setup": setup}))


def _noted_size(attempt: Attempt, folder: str, wanted: int) -> int:
    """Return how many prompts are generated together by the run's latest note, at most `wanted`; 0 if none says."""
    notes = attempt.earlier(f"{folder}/{_FOUND_NAME}")
    noted = int(durable.read_json(notes[-1])) if notes else wanted
    return min(noted, wanted or noted)


def halve_batches(folder: Path, size: int, error: OutOfMemory) -> OutOfMemory:
    """Note in `folder` that later attempts take half of the prompts at once; return the error that says so."""
    message = f"{error.message}: a batch of {size} prompts"
    if size > 1:
        durable.write_json(folder / _FOUND_NAME, size // 2)
        message += f"; the next attempt takes {size // 2} at once"
    return OutOfMemory(message, error.hint)
