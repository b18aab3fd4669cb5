"""From answers to numbers: every record's scores, both models' means, former champions, suites and the noise floor."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pipeline import durable
from pipeline.artifacts import FormerScores, NoiseFloor, Scores, SuiteScores
from pipeline.contract import Attempt
from pipeline.evaluate.inference import Result
from pipeline.evaluate.plan import ModelRequests
from pipeline.evaluate.prediction_cache import ItemScore, Prediction, PredictionCache, PredictionKey, hash_tokens
from pipeline.evaluate.suites import Suite
from pipeline.metrics import collapse
from pipeline.metrics.degenerate import KINDS, degenerate
from pipeline.metrics.registry import METRICS, Metric
from pipeline.metrics.tokens import tokens
from pipeline.models import trained_ids
from pipeline.records.heldout import HeldoutRecord

_POINTS = 100

Line = dict[str, Any]


def score_answers(records: Sequence[HeldoutRecord], answers: Sequence[Prediction], primary: str) -> list[Line]:
    """
    Return what a line of records.jsonl says of one model, in the order of the records.

    Scores are 0 to 1, of the primary metric and of every other one that says something about the record's references.
    """
    references = [record.references for record in records]
    texts = [answer.text for answer in answers]
    columns = {
        metric.name: _column(metric, texts, references, everywhere=metric.name == primary)
        for metric in METRICS.values()
    }
    return [
        {
            "text": answer.text,
            "tokens": answer.tokens,
            "scores": {name: column[place] for name, column in columns.items() if place in column},
            "nll_sum": answer.nll_sum,
            "nll_tokens": answer.nll_tokens,
            "degenerate": degenerate(answer.text, references[place], ended=answer.ended),
        }
        for place, answer in enumerate(answers)
    ]


def _column(
    metric: Metric, texts: Sequence[str], references: Sequence[Sequence[str]], *, everywhere: bool
) -> dict[int, float]:
    """Return a metric's scores by the record's place, of all or of those that it says something about."""
    places = [place for place, some in enumerate(references) if everywhere or metric.says_something(some)]
    scores = metric.scores([texts[place] for place in places], [references[place] for place in places])
    return dict(zip(places, scores, strict=True))


def write_records(
    path: Path, records: Sequence[HeldoutRecord], candidate: Sequence[Line], champion: Sequence[Line]
) -> None:
    """Write records.jsonl: a record a line, with what both models made of it."""
    _write(
        path,
        (
            {
                "id": record.id,
                "group": record.group,
                "drop": record.drop,
                "pinned": record.pinned,
                "tags": record.tags,
                "instruction": record.instruction,
                "input": record.input,
                "references": record.references,
                "candidate": one,
                "champion": other,
            }
            for record, one, other in zip(records, candidate, champion, strict=True)
        ),
    )


def summarise(
    requests: ModelRequests, result: Result, lines: Sequence[Line], records: Sequence[HeldoutRecord]
) -> Scores:
    """
    Return one model's means over the records, in points, and what its answers are like.

    The mean of a metric that says nothing about some of the records is that of the others.
    """
    answers = result.predictions
    scored = [line["scores"] for line in lines]
    return Scores(
        model_id=requests.key.model_id,
        metrics={
            name: _POINTS * fmean(scores[name] for scores in scored if name in scores)
            for name in METRICS
            if any(name in scores for scores in scored)
        },
        nll=sum(answer.nll_sum for answer in answers) / sum(answer.nll_tokens for answer in answers),
        generated=result.generated,
        resumed=result.resumed,
        cached=len(answers) - result.generated,
        seconds=result.seconds,
        rates={kind: _POINTS * fmean(kind in line["degenerate"] for line in lines) for kind in KINDS},
        length_ratio=_length_ratio(records, answers),
        answer_tokens=fmean(answer.tokens for answer in answers),
        seconds_per_answer=fmean(answer.seconds for answer in answers),
        size_bytes=sum(
            path.stat().st_size
            for path in requests.folder.rglob("*")
            if path.is_file() and path.name != trained_ids.NAME
        ),
    )


def score_suites(
    folder: Path, suites: Sequence[Suite], both: tuple[Result, Result], base: Result | None, train: Path
) -> tuple[SuiteScores, ...]:
    """
    Return the points of candidate and champion on each suite; each item's scores are left in a file of `folder`.

    The base model's stand beside them where it has a score for every one of these items. Beside those of questions that
    are answered freely stands what each answer is instead of an answer: labels are those of the rows in `train`.
    """
    found = []
    for number, suite in enumerate(suites):
        one, other = (result.suites[suite.digest] for result in both)
        third = {} if base is None else base.suites[suite.digest]
        # In the suite's own order; lm-eval's task has its items in its own hands.
        wanted = [item.id for item in suite.items] or sorted(one)
        items = [name for name in wanted if name in one and name in other]
        if not items:
            continue
        with_base = all(item in third for item in items)
        by_role = {"candidate": one, "champion": other, **({"base": third} if with_base else {})}
        lines: list[Line] = [
            {"id": item, "category": one[item].category, **{role: own[item].score for role, own in by_role.items()}}
            for item in items
        ]
        # A choice has no text: in a suite of both it would pass for an empty answer.
        if suite.items and all(item.words for item in suite.items):
            kinds = _collapsed(by_role, items, train)
            for place, line in enumerate(lines):
                line["texts"] = {role: own[line["id"]].text for role, own in by_role.items()}
                line["collapsed"] = {role: kinds[role][place] for role in by_role}
        name = f"suite-{number}.jsonl"
        _write(folder / name, lines)
        points = {role: _POINTS * fmean(line[role] for line in lines) for role in by_role}
        found.append(SuiteScores(name=suite.name, records=len(items), file=name, **points))
    return tuple(found)


def _collapsed(
    by_role: Mapping[str, Mapping[str, ItemScore]], items: Sequence[str], train: Path
) -> dict[str, list[str]]:
    answers = {
        role: [(scores[item].text or "", scores[item].score > 0) for item in items] for role, scores in by_role.items()
    }
    # Rows that we mixed in came with no drop.
    outputs = (row["output"] for row in durable.read_jsonl(train) if "drop" in row)
    return collapse.collapsed(answers, "base" if "base" in by_role else "champion", outputs)


def score_former(
    attempt: Attempt, folder: Path, records: Sequence[HeldoutRecord], requests: ModelRequests, primary: str
) -> tuple[FormerScores, ...]:
    """
    Return former champions' primary metric over the records that they answered, asked in the way of `requests`.

    Only what is in the cache counts: nothing is generated. Each record's score is left in a file of `folder`.
    """
    hashes = [hash_tokens(prompt) for prompt in requests.prompts]
    found = []
    for model in attempt.spec.former:
        key = PredictionKey(model_id=model.model_id, setup=requests.key.setup)
        known = PredictionCache([attempt.root / attempt.spec.predictions / key.digest])
        answers = [(record, known.answer(prompt)) for record, prompt in zip(records, hashes, strict=True)]
        # What it was trained on it knows by heart.
        own = trained_ids.trained_ids(attempt.path(model.path))
        answered = [
            (record, answer.text) for record, answer in answers if answer is not None and not record.is_known(own)
        ]
        if not answered:
            continue
        scores = METRICS[primary].scores([text for _, text in answered], [record.references for record, _ in answered])
        name = f"former-{model.generation}.jsonl"
        _write(
            folder / name,
            ({"id": record.id, "score": score} for (record, _), score in zip(answered, scores, strict=True)),
        )
        found.append(
            FormerScores(
                generation=model.generation,
                model_id=model.model_id,
                records=len(scores),
                score=_POINTS * fmean(scores),
                file=name,
            )
        )
    return tuple(found)


def noise_floor(records: Sequence[HeldoutRecord], result: Result, primary: str) -> NoiseFloor | None:
    """Return what generating twice changed; `None` if nothing was."""
    if result.again is None:
        return None
    places = sorted(result.again)
    first = [result.predictions[place].text for place in places]
    second = [result.again[place] for place in places]
    references = [records[place].references for place in places]
    scores = zip(*(METRICS[primary].scores(texts, references) for texts in (first, second)), strict=True)
    return NoiseFloor(
        records=len(places),
        changed=sum(one != other for one, other in zip(first, second, strict=True)),
        points=_POINTS * fmean(abs(one - other) for one, other in scores),
    )


def _length_ratio(records: Sequence[HeldoutRecord], answers: Sequence[Prediction]) -> float | None:
    """Return the median of answer length over reference length in words (a letter where a script has no spaces)."""
    lengths = [
        (len(tokens(answer.text)), len(tokens(record.references[0])))
        for record, answer in zip(records, answers, strict=True)
    ]
    return median(ratios) if (ratios := [said / wanted for said, wanted in lengths if wanted]) else None


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    durable.write_bytes(path, text.encode())
