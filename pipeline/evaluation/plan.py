"""What candidate and champion are asked: the same records and suites, tokenised for each before either is loaded."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.artifacts import Model
from pipeline.contract import Attempt
from pipeline.dataset.heldout import HeldoutRecord
from pipeline.errors import CannotTrain, DropforgeError
from pipeline.evaluation.prediction_cache import PredictionKey, Setup, hash_tokens
from pipeline.evaluation.suites import Suite
from pipeline.model_folder.manifest import model_id
from pipeline.model_folder.trained_ids import trained_ids
from pipeline.prompt import Format, completion_ids, fold, prompt_ids
from pipeline.qlora import auto_batch_size, continuous_batching, generation
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import chosen_device, load_tokenizer

#: The request whose prompt tokens stand for a model's template.
_PROBE = fold("Repeat the word.", "word")
_FOUND_NAME = "batch-size.json"


Role = Literal["candidate", "champion", "base model"]


@dataclass(frozen=True)
class Paper:
    """A suite as one model is asked it."""

    suite: Suite
    prompts: list[list[int]] = field(default_factory=list)
    """Tokens of each item's question."""
    answers: list[list[list[int]]] = field(default_factory=list)
    """Tokens of each item's choices, or of its references, each with the one that ends it."""


@dataclass(frozen=True)
class Exam:
    """What one model is asked, and what its answers will be kept under."""

    role: Role
    folder: Path
    tokenizer: Any
    key: PredictionKey
    prompts: list[list[int]]
    completions: list[list[int]]
    """Tokens of each record's reference, with the one that ends it."""
    papers: tuple[Paper, ...] = ()
    users_own: bool = False
    """Whether the folder is the user's own, without a manifest: it may hold another model since it was hashed."""

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
class Exams:
    """What both models are asked, and which held-out records that leaves."""

    records: list[HeldoutRecord]
    candidate: Exam
    champion: Exam
    base: Exam | None
    """The suites alone; `None` if the base model is the champion, there is no suite, or it cannot be asked so."""
    too_long: int
    """Records that are left out because they do not fit into a window."""
    seen_by_champion: int
    """Records that are left out because the champion was trained on them or on near ones."""
    seen_by_candidate: int
    """Records that are asked though the candidate was trained on them."""


@dataclass(frozen=True)
class _Seat:
    """Which model is asked as what, in which format."""

    role: Role
    model_id: str
    folder: Path
    format: Format
    users_own: bool = False


def make_exams(
    attempt: Attempt, records: list[HeldoutRecord], suites: Sequence[Suite], decoding: Decoding, folder: Path
) -> Exams:
    """
    Return what both models are asked; with a batch size of 0 in `decoding` it is found, and kept in `folder`.

    What a model cannot be asked fairly is left out for both. Raises `CannotTrain` if nothing is left, or if a model
    cannot be asked by the engine that the settings name.
    """
    # A template may hold today's date: everything is tokenised before the long work.
    one, other = _seats(attempt)
    kept = _unseen(records, trained_ids(other.folder))
    asked = [_exam(seat, kept, suites, decoding) for seat in (one, other)]
    if attempt.config.evaluate.engine == "continuous":
        asked = [_asked_continuously(exam) for exam in asked]
    kept, (candidate, champion), too_long = _leave_out_too_long(kept, asked, decoding.max_new_tokens)
    if not decoding.batch_size:
        size = _batch_size(attempt, candidate, decoding.max_new_tokens, folder)
        candidate, champion = (_with_setup(exam, batch_size=size) for exam in (candidate, champion))
    own = trained_ids(one.folder)
    return Exams(
        kept, candidate, champion, _base_exam(attempt, candidate, other, decoding),
        too_long=too_long, seen_by_champion=len(records) - len(kept) - too_long,
        seen_by_candidate=sum(record.id in own for record in kept),
    )  # fmt: skip


def _seats(attempt: Attempt) -> tuple[_Seat, _Seat]:
    model, champion = attempt.load(Model), attempt.spec.champion
    # A merged model's own template renders the format that it was trained in. The base model, before any training, is
    # asked in the format that the candidate was trained in.
    own: Format = "chat"
    is_base = champion.model_id == model.base_model_id
    base_format: Format = model.format if is_base else own
    return (
        _Seat("candidate", model.model_id, attempt.path(model.folder), own),
        _Seat("champion", champion.model_id, attempt.path(champion.path), base_format, users_own=is_base),
    )


def _base_exam(attempt: Attempt, candidate: Exam, champion: _Seat, decoding: Decoding) -> Exam | None:
    """Return what the base model is asked beside a trained champion: the candidate's items of the suites."""
    model, folder = attempt.load(Model), Path(attempt.config.base_model)
    if champion.model_id == model.base_model_id or not candidate.papers:
        return None
    if attempt.config.base_model_id != model.base_model_id or not (folder / "config.json").is_file():
        say_base_is_not_asked("it is not there")
        return None
    seat = _Seat("base model", model.base_model_id, folder, model.format, users_own=True)
    try:
        asked = _exam(seat, [], [paper.suite for paper in candidate.papers], decoding)
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
        message = f"the champion was trained on all {len(records)} held-out records or near copies of them"
        raise CannotTrain(message, "drop held-out records that no model has seen, into the track's heldout folder")
    if len(kept) < len(records):
        sys.stderr.write(f"left out: {len(records) - len(kept)} held-out records that the champion knows by heart\n")
    return kept


def _exam(seat: _Seat, records: Sequence[HeldoutRecord], suites: Sequence[Suite], decoding: Decoding) -> Exam:
    tokenizer: Any = load_tokenizer(seat.folder)
    stops = generation.end_tokens(seat.folder, tokenizer)
    setup = Setup(
        template=hash_tokens(prompt_ids(tokenizer, seat.format, _PROBE)),
        max_new_tokens=decoding.max_new_tokens,
        repetition_penalty=decoding.repetition_penalty,
        batch_size=decoding.batch_size,
        **generation.arithmetic(seat.folder, chosen_device()),
    )

    def answer(content: str, output: str) -> list[int]:
        return completion_ids(tokenizer, seat.format, content, output, stops)

    def paper(suite: Suite) -> Paper:
        return Paper(
            suite=suite,
            prompts=[prompt_ids(tokenizer, seat.format, item.question) for item in suite.items],
            answers=[
                # How likely the end is after a choice says little of what the model knows.
                [answer(item.question, choice)[:-1] for choice in item.choices]
                or [answer(item.question, reference) for reference in item.references]
                for item in suite.items
            ],
        )

    return Exam(
        role=seat.role,
        folder=seat.folder,
        tokenizer=tokenizer,
        key=PredictionKey(model_id=seat.model_id, setup=setup),
        prompts=[prompt_ids(tokenizer, seat.format, record.content) for record in records],
        completions=[answer(record.content, record.output) for record in records],
        papers=tuple(map(paper, suites)),
        users_own=seat.users_own,
    )


def _leave_out_too_long(
    records: list[HeldoutRecord], exams: Sequence[Exam], answer_tokens: int
) -> tuple[list[HeldoutRecord], list[Exam], int]:
    """
    Leave out what does not fit into a model's window with its answer, for both models; return how many records.

    Training leaves such rows out too. Asked all the same, one long document would fail every run of the track.
    """
    window = min(_window(exam.folder) for exam in exams)

    def fits(exam: Exam, place: int) -> bool:
        return len(exam.prompts[place]) + max(answer_tokens, len(exam.completions[place])) <= window

    kept = [place for place in range(len(records)) if all(fits(exam, place) for exam in exams)]
    too_long = len(records) - len(kept)
    if not kept:
        message = f"none of the {len(records)} held-out records fits into the window of {window} tokens with its answer"
        raise CannotTrain(message, "drop shorter records, or use a base model with a longer window")
    if too_long:
        sys.stderr.write(f"left out: {too_long} held-out records longer than {window} tokens with their answer\n")
    items = [_fitting_items([exam.papers[number] for exam in exams], window) for number in range(len(exams[0].papers))]
    shorter = [
        replace(
            exam, prompts=[exam.prompts[n] for n in kept], completions=[exam.completions[n] for n in kept],
            papers=tuple(_cut(paper, places) for paper, places in zip(exam.papers, items, strict=True)),
        )
        for exam in exams
    ]  # fmt: skip
    return [records[n] for n in kept], shorter, too_long


def _fitting_items(papers: Sequence[Paper], window: float) -> list[int]:
    """Return the places of a suite's items that fit into the window with their answer, a free one with some room."""
    suite = papers[0].suite

    def fits(paper: Paper, place: int) -> bool:
        room = 0 if suite.items[place].choices else auto_batch_size.ROUND
        return len(paper.prompts[place]) + max(map(len, paper.answers[place])) + room <= window

    kept = [place for place in range(len(suite.items)) if all(fits(paper, place) for paper in papers)]
    if len(kept) < len(suite.items):
        sys.stderr.write(f"left out: {len(suite.items) - len(kept)} items of {suite.name} longer than the window\n")
    return kept


def _cut(paper: Paper, places: Sequence[int]) -> Paper:
    return Paper(
        suite=replace(paper.suite, items=tuple(paper.suite.items[place] for place in places)),
        prompts=[paper.prompts[place] for place in places], answers=[paper.answers[place] for place in places],
    )  # fmt: skip


def _window(folder: Path) -> float:
    """Return the most tokens that a model was made for; infinite if it does not say."""
    own = durable.read_json(folder / "config.json").get("max_position_embeddings")
    return own if isinstance(own, int) else math.inf


def _with_setup(exam: Exam, **changed: Any) -> Exam:
    setup = exam.key.setup.model_copy(update=changed)
    return replace(exam, key=exam.key.model_copy(update={"setup": setup}))


def _asked_continuously(exam: Exam) -> Exam:
    """Have a model asked by continuous batching; raises `CannotTrain` before either is loaded if it cannot be."""
    continuous_batching.check(exam.folder, exam.key.setup.repetition_penalty)
    return _with_setup(exam, engine=continuous_batching.ENGINE)


def _batch_size(attempt: Attempt, exam: Exam, answer_tokens: int, folder: Path) -> int:
    """Return how many prompts are generated together: what an earlier attempt of the run found, or found now."""
    for number in range(attempt.spec.attempt - 1, 0, -1):
        earlier = attempt.folder.with_name(f"{attempt.spec.step}-{number}") / folder.name / _FOUND_NAME
        if earlier.is_file():
            size = int(durable.read_json(earlier))
            break
    else:
        size = auto_batch_size.batch_size(exam.folder, exam.tokenizer, exam.prompts, answer_tokens)
    durable.write_json(folder / _FOUND_NAME, size)
    return size
