"""Candidate and champion answer the same held-out records in the same way; every answer is scored and kept."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline import durable, predictions
from pipeline.artifacts import Dataset, Model, Report, Scores
from pipeline.batch_log import BatchLog, batch_id
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.metrics import METRICS
from pipeline.predictions import Prediction, PredictionCache, PredictionKey, Setup, hash_tokens
from pipeline.prompt import Format, completion_ids, fold, prompt_ids
from pipeline.qlora import generation
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import chosen_device, load_tokenizer

RECORDS_NAME = "records.jsonl"
_LOG = ".batches.jsonl"
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
    resumed: int
    seconds: float


def evaluate(attempt: Attempt) -> Report:
    """
    Return both models' scores on the held-out records; each record's are in the report's records.jsonl.

    Answers that are in the prediction cache are taken from there, those that an interrupted attempt had computed from
    its log of batches. The predictions that were used are left in `predictions/<key>.jsonl`. Raises `StepFailed` if a
    model's likelihood is not finite or memory does not suffice, `CannotTrain` if the two models cannot be asked in the
    same way.
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
        second = replace(first, generated=0, resumed=0, seconds=0.0)
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
    """Return one model's predictions, from cache and earlier attempts where they are there; keep them in `folder`."""
    started = time.monotonic()
    digest = exam.key.digest
    work = _Work(records, exam, PredictionCache([attempt.root / attempt.spec.predictions / digest]))
    log = BatchLog(folder / f"{digest}{_LOG}", _earlier_logs(attempt, f"{folder.name}/{digest}{_LOG}"))
    sitting = _Sitting(attempt, exam, work, log)
    try:
        if work.without_nll or work.without_answer:
            sitting.fill_likelihoods()
            sitting.fill_answers(decoding)
    finally:
        sitting.close()
    ordered = work.predictions()
    lines = b"".join(prediction.model_dump_json().encode() + b"\n" for prediction in ordered)
    durable.write_bytes(folder / f"{digest}.jsonl", lines)
    return _Result(ordered, len(work.without_answer), sitting.resumed, time.monotonic() - started)


def _earlier_logs(attempt: Attempt, name: str) -> list[Path]:
    """Return the logs called `name` of the run's earlier attempts at this step, in their order."""
    folders = (attempt.folder.with_name(f"{attempt.spec.step}-{number}") for number in range(1, attempt.spec.attempt))
    return [folder / name for folder in folders if (folder / name).is_file()]


class _Work:
    """What is known of each record's prediction, by place, and what is still to be computed."""

    def __init__(self, records: Sequence[_Record], exam: _Exam, cache: PredictionCache) -> None:
        self.ids = [record.id for record in records]
        self.prompts = [hash_tokens(tokens) for tokens in exam.prompts]
        self.references = [hash_tokens(tokens) for tokens in exam.completions]
        places = range(len(records))
        known = {place: cache.likelihood(self.prompts[place], self.references[place]) for place in places}
        cached = {place: cache.answer(self.prompts[place]) for place in places}
        self.nll = {place: value for place, value in known.items() if value is not None}
        self.answers = {place: (found.text, found.tokens) for place, found in cached.items() if found is not None}
        self.without_nll = [place for place in places if place not in self.nll]
        self.without_answer = [place for place in places if place not in self.answers]

    def predictions(self) -> list[Prediction]:
        """Return the predictions of all records, now that their answers and likelihoods are there."""
        return [self._prediction(place) for place in range(len(self.ids))]

    def _prediction(self, place: int) -> Prediction:
        (text, tokens), (nll_sum, nll_tokens) = self.answers[place], self.nll[place]
        return Prediction(
            id=self.ids[place], prompt_hash=self.prompts[place], text=text, tokens=tokens,
            nll_sum=nll_sum, nll_tokens=nll_tokens, reference_hash=self.references[place],
        )  # fmt: skip


class _Sitting:
    """Computes what is missing, a batch at a time; the model is loaded once, and only if a batch needs it."""

    def __init__(self, attempt: Attempt, exam: _Exam, work: _Work, log: BatchLog) -> None:
        self._attempt, self._exam, self._work, self._log = attempt, exam, work, log
        self._pace = _Pace(attempt, exam.role, len(work.without_nll) + len(work.without_answer))
        self._model: generation.AskedModel | None = None
        self.resumed = 0
        """Answers that an earlier attempt had computed."""

    def fill_likelihoods(self) -> None:
        """Compute the missing likelihoods, before the longer work: a broken model shows here."""
        work, exam = self._work, self._exam
        pairs = [(exam.prompts[place], exam.completions[place]) for place in work.without_nll]
        batch_size, vocabulary = exam.key.setup.batch_size, generation.vocabulary(exam.folder)
        for batch in generation.likelihood_batches(pairs, batch_size, vocabulary):
            asked = [pairs[index] for index in batch]
            name = batch_id("likelihood", asked)
            found = self._log.find(name, len(batch))
            if found is None:
                found = generation.likelihoods(self._asked(), asked)
                self._refuse_broken([work.without_nll[index] for index in batch], found)
                self._log.add(name, found)
                self._pace.advance(len(batch), 0)
            else:
                self._pace.skip(len(batch))
            for index, (nll, tokens) in zip(batch, found, strict=True):
                work.nll[work.without_nll[index]] = (nll, tokens)

    def fill_answers(self, decoding: Decoding) -> None:
        """Generate the missing answers."""
        work = self._work
        prompts = [self._exam.prompts[place] for place in work.without_answer]
        for batch in generation.answer_batches(prompts, decoding.batch_size):
            asked = [prompts[index] for index in batch]
            name = batch_id("answer", asked)
            found = self._log.find(name, len(batch))
            if found is None:
                found = generation.answers(self._asked(), asked, decoding, self._attempt.check_stop)
                self._log.add(name, found)
                self._pace.advance(len(batch), sum(answer.tokens for answer in found))
            else:
                self.resumed += len(batch)
                self._pace.skip(len(batch))
            for index, (text, tokens) in zip(batch, found, strict=True):
                work.answers[work.without_answer[index]] = (text, tokens)

    def close(self) -> None:
        """Free the model's memory."""
        self._log.close()
        if self._model is not None:
            generation.close_model(self._model)

    def _asked(self) -> generation.AskedModel:
        if self._model is None:
            self._model = generation.open_model(self._exam.folder, self._exam.tokenizer, chosen_device())
        return self._model

    def _refuse_broken(self, places: Sequence[int], found: Sequence[generation.Likelihood]) -> None:
        for place, likelihood in zip(places, found, strict=True):
            if not math.isfinite(likelihood.nll):
                name = self._work.ids[place][:12]
                message = f"the {self._exam.role}'s likelihood of record {name} is not a finite number"
                raise StepFailed(message, "the model is broken: train again, with a lower train.learning_rate")


class _Pace:
    """Says how far one model's part is, and stops between batches when the step is to stop."""

    def __init__(self, attempt: Attempt, role: Role, total: int) -> None:
        self._attempt, self._role, self._total = attempt, role, total
        self._started = time.monotonic()
        self._generating_since: float | None = None
        self._done = self._skipped = self._tokens = 0
        attempt.check_stop()
        attempt.progress(0, total, phase=role)

    def skip(self, records: int) -> None:
        """Count `records` that an earlier attempt had done."""
        self._done += records
        self._skipped += records
        self._attempt.progress(self._done, self._total, phase=self._role)

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
        left = (now - self._started) / (self._done - self._skipped) * (self._total - self._done)
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
        resumed=result.resumed,
        cached=len(result.predictions) - result.generated,
        seconds=result.seconds,
    )
