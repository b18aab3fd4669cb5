"""The evidence card: report.json and report.html beside every verdict, promoted and refused alike."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pipeline import durable
from pipeline.artifacts import (
    RECORDS_NAME,
    Adapter,
    Artifact,
    Dataset,
    Evaluation,
    Judgement,
    Model,
    Verdict,
)
from pipeline.contract import Attempt
from pipeline.metrics.registry import METRICS
from pipeline.report.cost import run_cost
from pipeline.report.examples import pick
from pipeline.report.facts import Cost, Report, RunCost
from pipeline.report.page import write_files
from pipeline.report.story import reasons, tell

_FOLDER_NAME = "report"
A = TypeVar("A", bound=Artifact)


def write_report(attempt: Attempt, verdict: Verdict, judgement: Judgement | None = None) -> str:
    """
    Write `verdict`'s evidence card into a new folder of the attempt; return the folder, relative to the state folder.

    It shows what the run's earlier steps published, as far as it came; `judgement` is what the gate counted of it.
    """
    folder = attempt.make_folder(_FOLDER_NAME)
    place = attempt.relative(folder)
    write_files(folder, _report(attempt, verdict.model_copy(update={"report": place}), judgement))
    return place


def _report(attempt: Attempt, verdict: Verdict, judgement: Judgement | None) -> Report:
    dataset, config = attempt.load(Dataset), attempt.config
    adapter, model = _published(attempt, Adapter), _published(attempt, Model)
    evaluation = _published(attempt, Evaluation)
    judgement = judgement or _published(attempt, Judgement)
    regressions, gains = pick(_records(attempt, evaluation), verdict.metric)
    settings = config.model_dump(mode="json")
    return Report(
        run=attempt.spec.run,
        track=config.track,
        approval=config.gate.approval,
        story=tell(verdict, dataset, evaluation, attempt.spec, adapter),
        reasons=reasons(verdict),
        metric_title=METRICS[verdict.metric].title,
        min_gain=config.gate.min_gain,
        p_value_limit=config.gate.p_value,
        verdict=verdict,
        drops=attempt.spec.drops or dataset.drops,
        dataset=dataset,
        adapter=adapter,
        model=model,
        evaluation=evaluation,
        judgement=judgement,
        regressions=regressions,
        gains=gains,
        cost=_cost(run_cost(attempt.folder.parents[1], verdict.gain), adapter, model, evaluation),
        settings=settings,
        settings_sha256=hash_settings(settings),
    )


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of settings as JSON with sorted keys and without spaces."""
    written = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(written.encode()).hexdigest()


def _published(attempt: Attempt, kind: type[A]) -> A | None:
    return attempt.load(kind) if kind.step in attempt.spec.inputs else None


def _records(attempt: Attempt, evaluation: Evaluation | None) -> Iterator[dict[str, Any]]:
    if evaluation is not None:
        yield from durable.read_jsonl(attempt.path(evaluation.folder) / RECORDS_NAME)


def _cost(total: RunCost, adapter: Adapter | None, model: Model | None, evaluation: Evaluation | None) -> Cost:
    both = [] if evaluation is None else [evaluation.candidate, evaluation.champion]
    took = {
        "train": adapter and adapter.seconds,
        "merge": model and model.seconds,
        "candidate": evaluation and evaluation.candidate.seconds,
        "champion": evaluation and evaluation.champion.seconds,
    }
    return Cost(
        total=total,
        seconds={name: value for name, value in took.items() if value is not None},
        trained_tokens=adapter.trained_tokens if adapter else None,
        generated=sum(scores.generated for scores in both) if both else None,
        cached=sum(scores.cached for scores in both) if both else None,
        device=adapter.device if adapter else None,
    )
