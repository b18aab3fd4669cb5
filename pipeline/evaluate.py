"""Candidate and champion answer the same held-out records in the same way; every answer is scored and kept."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import durable, predictions
from pipeline.artifacts import Dataset, Model, Report, Scores
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, StepFailed
from pipeline.metrics import METRICS
from pipeline.predictions import Prediction, PredictionKey, Setup, hash_tokens
from pipeline.prompt import Format, completion_ids, fold, prompt_ids
from pipeline.qlora import generation
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import chosen_device, load_tokenizer
from pipeline.sitting import Exam, Result, Role, sit

RECORDS_NAME = "records.jsonl"
#: The request whose prompt tokens stand for a model's template.
_PROBE = fold("Repeat the word.", "word")


@dataclass(frozen=True)
class _Record:
    """One held-out record."""

    id: str
    content: str
    """What the user says."""
    output: str
    references: tuple[str, ...]
    drop: int


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
    records, candidate, champion, too_long = _leave_out_too_long(records, candidate, champion, decoding.max_new_tokens)
    predictions.comparable(candidate.key, champion.key)
    folder = attempt.make_folder("predictions")
    ids = [record.id for record in records]
    first = sit(attempt, candidate, ids, decoding, folder)
    if champion.key == candidate.key:
        second = replace(first, generated=0, resumed=0, seconds=0.0)
    else:
        second = sit(attempt, champion, ids, decoding, folder)
    scored = [_score(records, result.predictions) for result in (first, second)]
    report = attempt.make_folder("report")
    _write_records(report / RECORDS_NAME, records, (first, second), scored)
    return Report(
        folder=attempt.relative(report),
        metric=dataset.metric,
        heldout_version=dataset.heldout_version,
        records=len(records),
        records_too_long=too_long,
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


def _exams(attempt: Attempt, records: Sequence[_Record], decoding: Decoding) -> tuple[Exam, Exam]:
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


def _leave_out_too_long(
    records: list[_Record], candidate: Exam, champion: Exam, answer_tokens: int
) -> tuple[list[_Record], Exam, Exam, int]:
    """
    Leave out what does not fit into a model's window with its answer, for both models; return how many that were.

    Training leaves such rows out too. Asked all the same, one long document would fail every run of the track.
    """
    window = min(_window(exam.folder) for exam in (candidate, champion))

    def fits(exam: Exam, place: int) -> bool:
        return len(exam.prompts[place]) + max(answer_tokens, len(exam.completions[place])) <= window

    kept = [place for place in range(len(records)) if fits(candidate, place) and fits(champion, place)]
    too_long = len(records) - len(kept)
    if not kept:
        message = f"none of the {len(records)} held-out records fits into the window of {window} tokens with its answer"
        raise CannotTrain(message, "drop shorter records, or use a base model with a longer window")
    if too_long:
        sys.stderr.write(f"left out: {too_long} held-out records longer than {window} tokens with their answer\n")

    def of(exam: Exam) -> Exam:
        return replace(exam, prompts=[exam.prompts[n] for n in kept], completions=[exam.completions[n] for n in kept])

    return [records[n] for n in kept], of(candidate), of(champion), too_long


def _window(folder: Path) -> float:
    """Return the most tokens that a model was made for; infinite if it does not say."""
    own = durable.read_json(folder / "config.json").get("max_position_embeddings")
    return own if isinstance(own, int) else math.inf


@dataclass(frozen=True)
class _Seat:
    """Which model is asked as what, in which format."""

    role: Role
    model_id: str
    folder: Path
    format: Format


def _exam(seat: _Seat, records: Sequence[_Record], decoding: Decoding) -> Exam:
    tokenizer: Any = load_tokenizer(seat.folder)
    stops = generation.end_tokens(seat.folder, tokenizer)
    setup = Setup(
        template=hash_tokens(prompt_ids(tokenizer, seat.format, _PROBE)),
        max_new_tokens=decoding.max_new_tokens,
        repetition_penalty=decoding.repetition_penalty,
        batch_size=decoding.batch_size,
        **generation.arithmetic(seat.folder, chosen_device()),
    )
    return Exam(
        role=seat.role,
        folder=seat.folder,
        tokenizer=tokenizer,
        key=PredictionKey(model_id=seat.model_id, setup=setup),
        prompts=[prompt_ids(tokenizer, seat.format, record.content) for record in records],
        completions=[
            completion_ids(tokenizer, seat.format, record.content, record.output, stops) for record in records
        ],
    )


def _score(records: Sequence[_Record], answers: Sequence[Prediction]) -> list[dict[str, float]]:
    """Return every metric of every answer, 0 to 1, in the order of the records."""
    texts = [answer.text for answer in answers]
    references = [record.references for record in records]
    columns = {name: metric.scores(texts, references) for name, metric in METRICS.items()}
    return [{name: column[place] for name, column in columns.items()} for place in range(len(records))]


def _write_records(
    path: Path, records: Sequence[_Record], results: Sequence[Result], scored: Sequence[Sequence[dict[str, float]]]
) -> None:
    lines = []
    for place, record in enumerate(records):
        line: dict[str, Any] = {"id": record.id, "drop": record.drop}
        for role, result, scores in zip(("candidate", "champion"), results, scored, strict=True):
            line[role] = {"text": result.predictions[place].text, "scores": scores[place]}
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    durable.write_bytes(path, "".join(lines).encode())


def _summary(exam: Exam, result: Result, scored: Sequence[dict[str, float]]) -> Scores:
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
