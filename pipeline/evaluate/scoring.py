"""Score answers: per record, both models' means, suites, former champions, and a trial compared with its control."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pipeline import durable
from pipeline.artifacts import Evaluation, FormerScores, Scores, SuiteScores, TrialScores, Verdict
from pipeline.contract import Attempt
from pipeline.decide import statistics
from pipeline.decide.comparison import DAMAGES, Comparison, compare, read_lines
from pipeline.decide.slices import Known, judged_on
from pipeline.evaluate.inference import Result
from pipeline.evaluate.plan import EvalPlan, ModelRequests
from pipeline.evaluate.prediction_cache import read_values
from pipeline.evaluate.suites import Item, Suite
from pipeline.metrics.degenerate import DEGENERATE, collapsed, degenerate
from pipeline.metrics.registry import METRICS, token_f1
from pipeline.models.manifest import trained_ids
from pipeline.records.heldout import HeldoutRecord

_POINTS = 100
#: Fields of each held-out record in records.jsonl; those after earlier turns have "turns", too.
_FIELDS = ("id", "group", "drop", "pinned", "tags", "instruction", "input", "references")

Line = dict[str, Any]


def score_answers(records: Sequence[HeldoutRecord], result: Result, primary: str) -> list[Line]:
    """
    Return one model's part of each line of records.jsonl, in the order of the records.

    The keys are text, tokens, scores, nll_sum (in nats), nll_tokens and degenerate (kinds, or none). Scores are 0 to 1,
    by the primary metric and every other one that applies to the record's references.
    """
    references = [record.references for record in records]
    texts = [answer.text for answer in result.answers]
    columns: dict[str, dict[int, float]] = {}
    for name, metric in METRICS.items():
        indices = [n for n, some in enumerate(references) if name == primary or metric.applies_to(some)]
        scores = metric.scores([texts[index] for index in indices], [references[index] for index in indices])
        columns[name] = dict(zip(indices, scores, strict=True))
    return [
        {
            "text": answer.text,
            "tokens": answer.tokens,
            "scores": {name: column[index] for name, column in columns.items() if index in column},
            "nll_sum": likelihood.nll,
            "nll_tokens": likelihood.tokens,
            "degenerate": degenerate(answer.text, references[index], ended=answer.ended),
        }
        for index, (answer, likelihood) in enumerate(zip(result.answers, result.likelihoods, strict=True))
    ]


def write_records(
    path: Path, records: Sequence[HeldoutRecord], candidate: Sequence[Line], champion: Sequence[Line]
) -> None:
    """Write `path`, records.jsonl: per record its fields, and under each role that model's `score_answers` line."""
    durable.write_jsonl(
        path,
        (
            {
                **{field: getattr(record, field) for field in _FIELDS},
                **({"turns": record.turns} if record.turns else {}),
                "candidate": mine,
                "champion": theirs,
            }
            for record, mine, theirs in zip(records, candidate, champion, strict=True)
        ),
    )


def summarise(requests: ModelRequests, result: Result, lines: Sequence[Line]) -> Scores:
    """
    Return one model's mean scores in points, NLL in nats per token, and rates of degenerate answers in per cent.

    `lines` are from `score_answers`. The mean of a metric is over the records that have its score; a metric without any
    is left out.
    """
    scored = [line["scores"] for line in lines]
    return Scores(
        model_id=requests.key.model_id,
        metrics={
            name: _POINTS * fmean(scores[name] for scores in scored if name in scores)
            for name in METRICS
            if any(name in scores for scores in scored)
        },
        nll=sum(value.nll for value in result.likelihoods) / sum(value.tokens for value in result.likelihoods),
        generated=result.generated,
        cached=len(result.answers) - result.generated,
        seconds=result.seconds,
        rates={kind: _POINTS * fmean(kind in line["degenerate"] for line in lines) for kind in DEGENERATE},
        answer_tokens=fmean(answer.tokens for answer in result.answers),
    )


def score_suites(
    folder: Path, suites: Sequence[Suite], results: Sequence[Result], train: Path
) -> tuple[SuiteScores, ...]:
    """
    Return the models' points on each suite; write each item's scores to suite-N.jsonl in `folder`, N from 0.

    `results` are those of candidate, champion and, if that is another model, base. If all items of a suite are free
    questions, the file also has each answer's text and its kind of collapse, or "", by `collapsed` with the outputs in
    the file `train`, without general rows.
    """
    roles, scores = ("candidate", "champion", "base")[: len(results)], []
    for number, suite in enumerate(suites):
        values = {role: result.suites[number] for role, result in zip(roles, results, strict=True)}
        lines: list[Line] = [
            {
                "id": item.id,
                "category": item.category,
                **{role: _score_item(item, of_items[index]) for role, of_items in values.items()},
            }
            for index, item in enumerate(suite.items)
        ]
        # A choice has no text: in a mixed suite it would count as an empty answer.
        if all(item.words and not item.choices for item in suite.items):
            answers = {
                role: [(value[0], line[role] > 0) for value, line in zip(of_items, lines, strict=True)]
                for role, of_items in values.items()
            }
            # Built-in general rows have no drop.
            outputs = (row["output"] for row in durable.read_jsonl(train) if "drop" in row)
            kinds = collapsed(answers, roles[-1], outputs)
            for index, line in enumerate(lines):
                line["texts"] = {role: answers[role][index][0] for role in values}
                line["collapsed"] = {role: kinds[role][index] for role in values}
        name = f"suite-{number}.jsonl"
        durable.write_jsonl(folder / name, lines)
        points = {role: _POINTS * fmean(line[role] for line in lines) for role in values}
        scores.append(SuiteScores(name=suite.name, records=len(lines), file=name, **points))
    return tuple(scores)


def _score_item(item: Item, value: Sequence[Any]) -> float:
    """Return the score, 0 to 1, of a `value`: the mean NLLs of an item's choices, or an answer's fields, text first."""
    if item.choices:
        return item.score_choice(value)
    return item.score_text(value[0]) if item.words else token_f1(value[0], item.answers)


def score_former(
    attempt: Attempt, folder: Path, records: Sequence[HeldoutRecord], requests: ModelRequests, primary: str
) -> tuple[FormerScores, ...]:
    """
    Return each former champion's mean score on the records that it answered under the setup of `requests`.

    It is by the primary metric, in points, `None` without a record. Only cached answers count: nothing is generated.
    Records that the former champion was trained on, or on near-duplicates, do not count. Each record's score is written
    to former-GENERATION.jsonl in `folder`.
    """
    keys = [answer.key for _, answer in requests.records]
    scored = []
    for model in attempt.spec.former:
        key = requests.key.model_copy(update={"model_id": model.model_id})
        known = read_values(sorted((attempt.root / attempt.spec.predictions / key.digest).glob("*.jsonl")))
        # It may have memorised the records that it was trained on.
        trained = trained_ids(attempt.path(model.path))
        answered = [
            (record, known[asked][0])
            for record, asked in zip(records, keys, strict=True)
            if asked in known and not record.is_known(trained)
        ]
        texts, references = [text for _, text in answered], [record.references for record, _ in answered]
        scores = METRICS[primary].scores(texts, references) if answered else []
        name = f"former-{model.generation}.jsonl"
        durable.write_jsonl(
            folder / name,
            ({"id": record.id, "score": score} for (record, _), score in zip(answered, scores, strict=True)),
        )
        scored.append(
            FormerScores(
                generation=model.generation,
                model_id=model.model_id,
                records=len(scores),
                score=_POINTS * fmean(scores) if scores else None,
                file=name,
            )
        )
    return tuple(scored)


def score_watch(plan: EvalPlan, former: Result, champion: Sequence[Line], metric: str) -> dict[int, float]:
    """
    Return the champion's mean score minus the former champion's, in points, by fresh drop; empty without any.

    `former` has the former champion's answers to `plan.fresh`, `champion` the lines of `score_answers` for all records.
    """
    if not plan.fresh:
        return {}
    scores = {record.id: line["scores"][metric] for record, line in zip(plan.records, champion, strict=True)}
    references = [record.references for record in plan.fresh]
    answers = [answer.text for answer in former.answers]
    differences: dict[int, list[float]] = {}
    for record, score in zip(plan.fresh, METRICS[metric].scores(answers, references), strict=True):
        differences.setdefault(record.drop, []).append(scores[record.id] - score)
    return {drop: _POINTS * fmean(values) for drop, values in differences.items()}


def score_trial(attempt: Attempt, records: Path, setup: str) -> TrialScores | None:
    """
    Return the scores of the trial that the run of `attempt` is the control of; `None` if they cannot be compared.

    The control has the champion's drops without the suspect. `records` is its records.jsonl. A record counts if it is
    of the same drop in both runs, as the suspect may have brought another reference for its prompt, and if the gate
    judges on it; without any the scores have 0 groups and a p-value of 1. They cannot be compared if the trial's setup
    is another than `setup`, or what it published is damaged, which goes to standard error.
    """
    control = {(line["id"], line["drop"]): line["candidate"] for line in durable.read_jsonl(records)}
    try:
        trial = Evaluation.model_validate(durable.read_json(attempt.path(attempt.spec.trial[Evaluation.step])))
        verdict = Verdict.model_validate(durable.read_json(attempt.path(attempt.spec.trial[Verdict.step])))
        both = [line for line in read_lines(attempt.root, trial) if (line["id"], line["drop"]) in control]
        compared = compare(trial.metric, [{**line, "champion": control[line["id"], line["drop"]]} for line in both])
    except DAMAGES as error:
        sys.stderr.write(f"what the trial published is damaged: {error!r}\n")
        return None
    if trial.setup != setup:
        return None
    if not both:
        return TrialScores(groups=0, wins=0, losses=0, p_value=1.0)
    scores = compare_with_control(compared, verdict, attempt.config.gate.on)
    return scores.model_copy(update={"lost_drops": verdict.lost_drops})


def compare_with_control(comparison: Comparison, verdict: Verdict, on: str = "all") -> TrialScores:
    """
    Test whether a trial's candidate is worse than its control's candidate, which is the champion of `comparison`.

    If the trial lost drops by its `verdict`, only their records are compared; else, or if the outcome is `worse`, all
    on which the gate judges by its setting `on`. If the guard `nll` failed, the test is of the references' negative
    log-likelihood per token on all of the latter; if `slice` failed, too, both tests are made, and the result is that
    of the smaller p-value, which is doubled. The p-values are one-sided, by tests that are exact or corrected for skew.
    """
    judged = comparison.part(judged_on(on, Known(), comparison.drops, comparison.pinned))
    # A model that is worse on all records together is compared on all: the drops that lost most are chosen by chance.
    failed = {row.guard for row in verdict.guards if row.state == "failed" and verdict.outcome != "worse"}
    lost = np.isin(judged.drops, verdict.lost_drops if verdict.outcome != "worse" else ())
    tests = []
    if "nll" not in failed or "slice" in failed:
        tests.append((judged.part(lost) if lost.any() else judged).differences())
    if "nll" in failed:
        sums, tokens = (judged.sums(pair) for pair in judged.nll)
        rises = sums[:, 0] / tokens[:, 0] - sums[:, 1] / tokens[:, 1]
        tests.append(-np.nan_to_num(rises, nan=1.0, posinf=1.0))
    p_value, differences = min(((statistics.one_sided_p(-test), test) for test in tests), key=lambda pair: pair[0])
    wins, losses = statistics.count_signs(differences)
    p_value = min(1.0, len(tests) * p_value)
    return TrialScores(groups=differences.size, wins=wins, losses=losses, p_value=p_value)
