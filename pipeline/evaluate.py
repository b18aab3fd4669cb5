"""Candidate and champion answer the same held-out records in the same way; every answer is scored and kept."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline import durable, predictions
from pipeline.artifacts import Dataset, Model, Report, Scores
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.metrics import METRICS
from pipeline.predictions import Prediction, PredictionCache, PredictionKey, Setup, hash_tokens
from pipeline.prompt import Format, completion_ids, fold, prompt_ids
from pipeline.qlora import generation
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import chosen_device, load_tokenizer

RECORDS_NAME = "records.jsonl"
#: The request whose prompt tokens stand for a model's template.
_PROBE = fold("Repeat the word.", "word")

Role = Literal["candidate", "champion"]


@dataclass(frozen=True)
class _Record:
    """One held-out record."""

    id: str
    content: str
    """What the user says."""
    output: str
    references: tuple[str, ...]
    drop: int


@dataclass(frozen=True)
class _Exam:
    """What one model is asked, and what its answers will be kept under."""

    role: Role
    folder: Path
    tokenizer: Any
    key: PredictionKey
    prompts: list[list[int]]
    completions: list[list[int]]
    """Tokens of each record's reference, with the one that ends it."""


@dataclass(frozen=True)
class _Result:
    """One model's predictions, in the order of the records."""

    predictions: list[Prediction]
    generated: int
    seconds: float


def evaluate(attempt: Attempt) -> Report:
    """
    Return both models' scores on the held-out records; each record's are in the report's records.jsonl.

    Answers that are in the prediction cache are taken from there. The predictions that were used are left in
    `predictions/<key>.jsonl`. Raises `StepFailed` if a model's likelihood is not finite or memory does not suffice,
    `CannotTrain` if the two models cannot be asked in the same way.
    """
    dataset = attempt.load(Dataset)
    records = _read_records(attempt.path(dataset.folder) / "heldout.jsonl")
    settings = attempt.config.evaluate
    decoding = Decoding(dataset.max_new_tokens, settings.repetition_penalty, settings.batch_size)
    candidate, champion = _exams(attempt, records, decoding)
    predictions.comparable(candidate.key, champion.key)
    folder = attempt.make_folder("predictions")
    first = _sit(attempt, candidate, records, decoding, folder)
    if champion.key == candidate.key:
        second = replace(first, generated=0, seconds=0.0)
    else:
        second = _sit(attempt, champion, records, decoding, folder)
    scored = [_score(records, result.predictions) for result in (first, second)]
    report = attempt.make_folder("report")
    _write_records(report / RECORDS_NAME, records, (first, second), scored)
    return Report(
        folder=attempt.relative(report),
        metric=dataset.metric,
        heldout_version=dataset.heldout_version,
        records=len(records),
        candidate=_summary(candidate, first, scored[0]),
        champion=_summary(champion, second, scored[1]),
        champion_generation=attempt.spec.champion.generation,
        prediction_keys={exam.key.model_id: exam.key.digest for exam in (candidate, champion)},
    )


def _read_records(path: Path) -> list[_Record]:
    records = [
        _Record(
            id=row["id"],
            content=fold(row["instruction"], row["input"]),
            output=row["output"],
            references=tuple(row["references"]) or (row["output"],),
            drop=row["drop"],
        )
        for row in durable.read_jsonl(path)
    ]
    if not records:
        message = "there are no held-out records to evaluate on"
        raise StepFailed(message, "drop more rows, or a held-out set of your own into the track's heldout folder")
    return records


def _exams(attempt: Attempt, records: Sequence[_Record], decoding: Decoding) -> tuple[_Exam, _Exam]:
    """Return what both models are asked, tokenised before either is loaded: a template may hold today's date."""
    model, champion = attempt.load(Model), attempt.spec.champion
    # A merged model's own template renders the format that it was trained in. The base model, before any training, is
    # asked in the format that the candidate was trained in.
    own: Format = "chat"
    base_format: Format = model.format if champion.model_id == model.base_model_id else own
    return (
        _exam(_Seat("candidate", model.model_id, attempt.path(model.folder), own), records, decoding),
        _exam(_Seat("champion", champion.model_id, attempt.path(champion.path), base_format), records, decoding),
    )


@dataclass(frozen=True)
class _Seat:
    """Which model is asked as what, in which format."""

    role: Role
    model_id: str
    folder: Path
    format: Format


def _exam(seat: _Seat, records: Sequence[_Record], decoding: Decoding) -> _Exam:
    tokenizer: Any = load_tokenizer(seat.folder)
    stops = generation.end_tokens(seat.folder, tokenizer)
    setup = Setup(
        template=hash_tokens(prompt_ids(tokenizer, seat.format, _PROBE)),
        max_new_tokens=decoding.max_new_tokens,
        repetition_penalty=decoding.repetition_penalty,
        batch_size=decoding.batch_size,
        **generation.arithmetic(seat.folder, chosen_device()),
    )
    return _Exam(
        role=seat.role,
        folder=seat.folder,
        tokenizer=tokenizer,
        key=PredictionKey(model_id=seat.model_id, setup=setup),
        prompts=[prompt_ids(tokenizer, seat.format, record.content) for record in records],
        completions=[
            completion_ids(tokenizer, seat.format, record.content, record.output, stops) for record in records
        ],
    )


def _sit(attempt: Attempt, exam: _Exam, records: Sequence[_Record], decoding: Decoding, folder: Path) -> _Result:
    """Return one model's predictions, from the cache where they are there, and write them to `folder` as they come."""
    started = time.monotonic()
    cache = PredictionCache([attempt.root / attempt.spec.predictions / exam.key.digest])
    work = _Work(records, exam, cache)
    with (folder / f"{exam.key.digest}.jsonl").open("wb") as file:
        for prediction in _predict(attempt, exam, work, decoding):
            file.write(prediction.model_dump_json().encode() + b"\n")
            file.flush()
    ordered = [work.done[index] for index in range(len(records))]
    return _Result(ordered, work.generated, time.monotonic() - started)


class _Work:
    """What is known of each record's prediction, by place, and what is still to be computed."""

    def __init__(self, records: Sequence[_Record], exam: _Exam, cache: PredictionCache) -> None:
        self.ids = [record.id for record in records]
        self.prompts = [hash_tokens(tokens) for tokens in exam.prompts]
        self.references = [hash_tokens(tokens) for tokens in exam.completions]
        places = range(len(records))
        known = {place: cache.likelihood(self.prompts[place], self.references[place]) for place in places}
        answers = {place: cache.answer(self.prompts[place]) for place in places}
        self.nll = {place: value for place, value in known.items() if value is not None}
        self.answers = {place: (found.text, found.tokens) for place, found in answers.items() if found is not None}
        self.without_nll = [place for place in places if place not in self.nll]
        self.without_answer = [place for place in places if place not in self.answers]
        self.generated = len(self.without_answer)
        self.done: dict[int, Prediction] = {}

    def finish(self, place: int) -> Prediction:
        """Return and keep the prediction at `place`, now that its answer and its likelihood are there."""
        (text, tokens), (nll_sum, nll_tokens) = self.answers[place], self.nll[place]
        self.done[place] = Prediction(
            id=self.ids[place], prompt_hash=self.prompts[place], text=text, tokens=tokens,
            nll_sum=nll_sum, nll_tokens=nll_tokens, reference_hash=self.references[place],
        )  # fmt: skip
        return self.done[place]


def _predict(attempt: Attempt, exam: _Exam, work: _Work, decoding: Decoding) -> Iterator[Prediction]:
    """Yield each record's prediction as soon as it is whole; the model is loaded once, and only if it is needed."""
    total = len(work.without_nll) + len(work.without_answer)
    pace = _Pace(attempt, exam.role, total)
    if total == 0:
        yield from (work.finish(place) for place in range(len(work.ids)))
        return
    asked = generation.open_model(exam.folder, exam.tokenizer, chosen_device())
    try:
        _fill_likelihoods(exam, work, asked, pace)
        yield from (work.finish(place) for place in list(work.answers))
        prompts = [exam.prompts[place] for place in work.without_answer]
        for batch in generation.generate(asked, prompts, decoding):
            for answer in batch:
                place = work.without_answer[answer.index]
                work.answers[place] = (answer.text, answer.tokens)
                yield work.finish(place)
            pace.advance(len(batch), sum(answer.tokens for answer in batch))
    finally:
        generation.close_model(asked)


def _fill_likelihoods(exam: _Exam, work: _Work, asked: generation.AskedModel, pace: "_Pace") -> None:
    """Compute the missing likelihoods, before the longer work: a broken model shows here."""
    pairs = [(exam.prompts[place], exam.completions[place]) for place in work.without_nll]
    for batch in generation.reference_nll(asked, pairs, exam.key.setup.batch_size):
        for found in batch:
            place = work.without_nll[found.index]
            if not math.isfinite(found.nll):
                message = f"the {exam.role}'s likelihood of record {work.ids[place][:12]} is not a finite number"
                raise StepFailed(message, "the model is broken: train again, with a lower train.learning_rate")
            work.nll[place] = (found.nll, found.tokens)
        pace.advance(len(batch), 0)


class _Pace:
    """Says how far one model's part is, and stops between batches when the step is to stop."""

    def __init__(self, attempt: Attempt, role: Role, total: int) -> None:
        self._attempt, self._role, self._total = attempt, role, total
        self._started = time.monotonic()
        self._generating_since: float | None = None
        self._done = self._tokens = 0
        attempt.check_stop()
        attempt.progress(0, total, phase=role)

    def advance(self, records: int, tokens: int) -> None:
        """Count one batch of `records` in which `tokens` were generated."""
        now = time.monotonic()
        rate = None
        if tokens:
            self._tokens += tokens
            rate = self._tokens / max(now - (self._generating_since or self._started), 1e-9)
        else:
            self._generating_since = now
        self._done += records
        left = (now - self._started) / self._done * (self._total - self._done)
        self._attempt.progress(self._done, self._total, phase=self._role, tokens_per_second=rate, eta_seconds=left)
        self._attempt.check_stop()


def _score(records: Sequence[_Record], answers: Sequence[Prediction]) -> list[dict[str, float]]:
    """Return every metric of every answer, 0 to 1, in the order of the records."""
    texts = [answer.text for answer in answers]
    references = [record.references for record in records]
    columns = {name: metric.scores(texts, references) for name, metric in METRICS.items()}
    return [{name: column[place] for name, column in columns.items()} for place in range(len(records))]


def _write_records(
    path: Path, records: Sequence[_Record], results: Sequence[_Result], scored: Sequence[Sequence[dict[str, float]]]
) -> None:
    lines = []
    for place, record in enumerate(records):
        line: dict[str, Any] = {"id": record.id, "drop": record.drop}
        for role, result, scores in zip(("candidate", "champion"), results, scored, strict=True):
            line[role] = {"text": result.predictions[place].text, "scores": scores[place]}
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    durable.write_bytes(path, "".join(lines).encode())


def _summary(exam: _Exam, result: _Result, scored: Sequence[dict[str, float]]) -> Scores:
    nll = sum(found.nll_sum for found in result.predictions)
    return Scores(
        model_id=exam.key.model_id,
        metrics={name: 100 * sum(scores[name] for scores in scored) / len(scored) for name in METRICS},
        nll=nll / sum(found.nll_tokens for found in result.predictions),
        generated=result.generated,
        cached=len(result.predictions) - result.generated,
        seconds=result.seconds,
    )
