"""Plan an evaluation: tokenise the same records and suites for candidate and champion before loading either."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn

from pipeline import durable
from pipeline.artifacts import Model
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, StartAgain
from pipeline.evaluate.prediction_cache import PLAIN, PredictionKey, Request, comparable, request_hash
from pipeline.evaluate.suites import Item, Suite
from pipeline.evaluate.vllm import read_version
from pipeline.metrics.degenerate import is_looping
from pipeline.models import generation
from pipeline.models.generation import Decoding
from pipeline.models.loading import OutOfMemory, chosen_device
from pipeline.models.manifest import trained_ids, verify_manifest
from pipeline.models.placement import Quantization, inference_quantization, prompts_at_once
from pipeline.models.template import Format, Template, fold, single_turn
from pipeline.models.untrusted import read_window
from pipeline.records.heldout import HeldoutRecord
from pipeline.words import count

#: A fixed request whose prompt tokens identify a model's template.
_PROBE = fold("Repeat the word.", "word")
_SMALLER_NAME = "batch-size.json"
#: Answer lengths are rounded up to a multiple of so many tokens.
_ROUND = 16
#: Most tokens of an answer to a short free question.
_QUESTION_TOKENS = 32

Role = Literal["candidate", "champion", "base model", "former champion"]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate, with its role, quantization and prompt format."""

    role: Role
    model_id: str
    folder: Path
    quantization: Quantization
    format: Format = "chat"


@dataclass(frozen=True)
class ModelRequests:
    """The requests to one model, and the key under which its values are cached."""

    model: EvaluatedModel
    template: Template
    key: PredictionKey
    records: list[tuple[Request, Request]]
    """Of each record, for the likelihood of its reference with its end token, and for an answer."""
    suites: list[list[Request]]
    """Of each suite, one per item."""
    window: int
    """Most tokens of prompt and answer together: the model's context window, with vLLM one less."""

    def parts(self) -> list[Sequence[Request]]:
        """
        Return the requests for likelihoods, those for answers (neither without records), then those of each suite.

        Likelihoods are first as they reveal a broken model soon.
        """
        return [*zip(*self.records, strict=True), *self.suites]

    def longest(self) -> int:
        """Return 1 + an upper bound, at most `window`, of the tokens of any prompt and its answer together."""
        requests = [*chain(*self.parts())]
        together = max(len(request.tokens) for request in requests) + max(request.longest for request in requests)
        return min(together, self.window) + 1


@dataclass(frozen=True)
class EvalPlan:
    """The requests to each model, the remaining held-out records, and the numbers of those left out."""

    records: list[HeldoutRecord]
    models: list[ModelRequests]
    """Candidate and champion; then the base model, of which only the suites are requested, if it is a third one."""
    fresh: list[HeldoutRecord]
    """Those that the former champion on watch answers, too; with any, it is the last of `models`."""
    counts: dict[str, Any]
    """The fields of `Evaluation` that say how many records are kept, are left out, or were seen; and `unwatched`."""


def make_plan(
    attempt: Attempt, records: list[HeldoutRecord], suites: Sequence[Suite], max_new_tokens: int, predictions: Path
) -> EvalPlan:
    """
    Return the evaluation plan: prompts tokenised for all models, and the batch size.

    A batch size of 0 in the settings is that of `prompts_at_once`; it is smaller if earlier attempts noted in their
    `predictions` that memory ran out. Records are left out for both if the champion was trained on them or on
    near-duplicates, or if they exceed a window with their answer; standard error then says how many. If a model does
    not fit on the GPUs, all are evaluated in NF4. Raises `CannotTrain` if no record is left, a suite's item exceeds a
    window, a model's tokenizer cannot be loaded, the models' setups differ, or the settings name a vLLM that cannot be
    run; `StepFailed` if a model does not even fit in NF4.
    """
    # A template may contain today's date: everything is tokenised before the long work.
    settings = attempt.config.evaluate
    candidate, champion, *others = _evaluated(attempt, settings.vllm)
    decoding = Decoding(max_new_tokens, settings.repetition_penalty, settings.batch_size)
    trained, engine = trained_ids(candidate.folder), engine_of(settings.vllm)
    kept = _unseen(records, trained_ids(champion.folder))
    both = [requests_to(evaluated, kept, suites, decoding, engine) for evaluated in (candidate, champion)]
    kept, plans, too_long = _leave_out_too_long(kept, both)
    plans += [requests_to(base, [], suites, decoding, engine) for base in others if suites]
    fresh, watched, unwatched = _watched(attempt, kept, decoding, plans[0])
    plans += watched
    longest, folders = max(requests.longest() for requests in plans), (candidate.folder, champion.folder)
    first = settings.batch_size or prompts_at_once(chosen_device(), candidate.quantization, longest, folders)
    smaller = attempt.earlier(f"{predictions.name}/{_SMALLER_NAME}")
    size = min([first, *(int(durable.read_json(note)) for note in smaller)])
    plans = [replace(each, key=each.key.model_copy(update={"batch_size": size})) for each in plans]
    for other in plans[1:]:
        comparable(plans[0].key, other.key, other.model.role)
    counts = {
        "records": len(kept),
        "records_too_long": too_long,
        "records_seen_by_champion": len(records) - len(kept) - too_long,
        "records_seen_by_candidate": sum(record.id in trained for record in kept),
        "unwatched": unwatched,
    }
    return EvalPlan(kept, plans, fresh, counts)


def engine_of(program: str) -> str:
    """Return `PLAIN`, or vLLM's name and version if its `program` is set. Raises `CannotTrain` as `read_version`."""
    return f"vllm {read_version(program)}" if program else PLAIN


def _evaluated(attempt: Attempt, program: str) -> list[EvaluatedModel]:
    """
    Return candidate and champion; then the base model, if it is a third one.

    They are in NF4 if one of the first two does not fit on the GPUs, but for vLLM's `program`, which holds weights as
    saved. Raises `StepFailed` if one does not even fit in NF4.
    """
    model, champion = attempt.load(Model), attempt.spec.champion
    is_base = champion.model_id == model.base_model_id
    folders = attempt.path(model.folder), attempt.path(champion.path)
    quantization = "none" if program else inference_quantization(chosen_device(), *folders)
    candidate = EvaluatedModel("candidate", model.model_id, folders[0], quantization)
    # A merged model's template renders its training format; the base is prompted in the candidate's format.
    folder = Path(attempt.config.base_model)
    base = EvaluatedModel("base model", model.base_model_id, folder, quantization, model.format)
    if is_base:
        return [candidate, replace(base, role="champion", folder=folders[1])]
    return [candidate, EvaluatedModel("champion", champion.model_id, folders[1], quantization), base]


def _watched(
    attempt: Attempt, records: list[HeldoutRecord], decoding: Decoding, candidate: ModelRequests
) -> tuple[list[HeldoutRecord], list[ModelRequests], int | None]:
    """
    Return the fresh records, the requests for them to the former champion on watch, and `None`.

    The former two are empty without a fresh record that it was not trained on. They are also empty if its files are
    damaged (standard error says so) or its setup differs: then the last value is its generation.
    """
    former, drops = attempt.spec.watched, attempt.spec.fresh_drops
    if former is None or not any(record.drop in drops for record in records):
        return [], [], None
    model = EvaluatedModel("former champion", former.model_id, attempt.path(former.path), candidate.model.quantization)
    try:
        verify_manifest(model.folder)
    except DropforgeError as error:  # it serves nobody: the run is judged without it
        sys.stderr.write(f"not compared with the former champion of generation {former.generation}: {error.message}\n")
        return [], [], former.generation
    trained = trained_ids(model.folder)
    fresh = [record for record in records if record.drop in drops and not record.is_known(trained)]
    requests = requests_to(model, fresh, [], decoding, candidate.key.engine)
    is_alike = requests.key == candidate.key.model_copy(update={"model_id": former.model_id})
    return (fresh, [requests], None) if fresh and is_alike else ([], [], former.generation if fresh else None)


def _unseen(records: list[HeldoutRecord], trained: frozenset[str]) -> list[HeldoutRecord]:
    """
    Return the records that the champion was not trained on; it may have memorised the others.

    Records with a near-duplicate that it was trained on are left out, too; standard error says how many. Raises
    `CannotTrain` if no record is left.
    """
    kept = [record for record in records if not record.is_known(trained)]
    if not kept:
        message = "the champion was trained on every held-out record, or on near-duplicates"
        raise CannotTrain(message, "drop held-out records that no model has seen, into the track's heldout folder")
    if len(kept) < len(records):
        sys.stderr.write(
            f"left out: {count(len(records) - len(kept), 'held-out record')} that the champion was trained on\n"
        )
    return kept


def requests_to(
    model: EvaluatedModel, records: Sequence[HeldoutRecord], suites: Sequence[Suite], decoding: Decoding, engine: str
) -> ModelRequests:
    """
    Return the requests to a model, also for records that exceed its window.

    Raises `CannotTrain` if a suite's item exceeds it, or the tokenizer cannot be used.
    """
    template = generation.load_template(model.folder, model.format)
    key = PredictionKey(
        model_id=model.model_id,
        template=request_hash("template", [*template.prompt(single_turn(_PROBE)), *template.opening]),
        repetition_penalty=decoding.repetition_penalty,
        batch_size=decoding.batch_size,
        engine=engine,
        **generation.arithmetic(model.folder, chosen_device(), model.quantization),
    )
    # vLLM generates one token even when only likelihoods are wanted.
    window = read_window(model.folder) - (engine != PLAIN)
    limit = decoding.max_new_tokens + len(template.opening)
    return ModelRequests(
        model,
        template,
        key,
        records=[_record_requests(record, template, limit) for record in records],
        suites=[_suite_requests(suite, template, window) for suite in suites],
        window=window,
    )


def _record_requests(record: HeldoutRecord, template: Template, limit: int) -> tuple[Request, Request]:
    tokens = template.prompt(record.messages())
    likelihood = Request("likelihood", tokens, template.target(record.messages(record.output)))
    return likelihood, Request("answer", tokens, limit, any(map(is_looping, record.references)))


def _suite_requests(suite: Suite, template: Template, window: int) -> list[Request]:
    """
    Return a request per item: for the likelihoods of its choices, or for an answer to a free question.

    All answers may have as many tokens as the longest that `_item_request` allows. Raises `CannotTrain` if an item
    exceeds `window` with its own choices or references.
    """
    requests = [_item_request(item, template) for item in suite.items]
    for item, request in zip(suite.items, requests, strict=True):
        if len(request.tokens) + request.longest > window:
            message = f"suite {suite.name}, item {item.id}: longer with its answer than the window, {window} tokens"
            raise CannotTrain(message, "shorten it or take it out, then continue: dropforge retry RUN")
    # The track's limit fits its own answers only.
    limit = max(request.limit for request in requests)
    return [request._replace(target=limit) if request.limit else request for request in requests]


def _item_request(item: Item, template: Template) -> Request:
    """
    Return the request for `item`: for the likelihoods of its choices, or for an answer.

    An answer may have as many tokens as the longest reference, rounded up to a multiple of 16 as in `prepare`, and to a
    question that is not scored by token F1 at least 32.
    """
    tokens, opening = template.prompt(single_turn(item.question)), template.opening
    targets = [template.target(single_turn(item.question, text)) for text in item.choices or item.answers]
    if item.choices:
        # Choices are compared without what is common to all: the opening, and the end token, whose likelihood says
        # little about the model's knowledge.
        return Request("choice", [*tokens, *opening], [target[len(opening) : -1] for target in targets])
    longest = -(-max(map(len, targets)) // _ROUND) * _ROUND
    least = _QUESTION_TOKENS if item.words else 0
    return Request("answer", tokens, max(least, longest), any(map(is_looping, item.answers)))


def _leave_out_too_long(
    records: list[HeldoutRecord], both: Sequence[ModelRequests]
) -> tuple[list[HeldoutRecord], list[ModelRequests], int]:
    """
    Leave out records that exceed a window with their answer; return the rest, their requests and how many are left out.

    The smaller window of both models counts. Standard error says how many are left out. Training leaves such rows out
    too; otherwise one long document would fail every run of the track. Raises `CannotTrain` if no record is left.
    """
    window = min(requests.window for requests in both)
    references = zip(*([likelihood for likelihood, _ in requests.records] for requests in both), strict=True)
    kept = [n for n, pair in enumerate(references) if all(len(it.tokens) + it.longest <= window for it in pair)]
    too_long = len(records) - len(kept)
    if not kept:
        message = f"no held-out record fits into the window of {window} tokens with its answer"
        raise CannotTrain(message, "drop shorter records, or use a base model with a longer window")
    if too_long:
        left_out = count(too_long, "held-out record")
        sys.stderr.write(f"left out: {left_out} longer than {window} tokens with the answer\n")
    shorter = [replace(requests, records=[requests.records[n] for n in kept]) for requests in both]
    return [records[n] for n in kept], shorter, too_long


def go_on_with_smaller_batches(folder: Path, size: int, error: OutOfMemory) -> NoReturn:
    """Save half of `size`, the batch size, in `folder` and raise `StartAgain`; if `size` is 1, only raise `error`."""
    if size == 1:
        raise error
    durable.write_json(folder / _SMALLER_NAME, size // 2)
    raise StartAgain(f"{error.message}: the next attempt uses batches of {size // 2} prompts, not {size}") from error
