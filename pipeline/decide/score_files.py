"""Read the score files of `evaluate` and `judge` into a comparison of candidate and champion."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import durable
from pipeline.artifacts import JUDGEMENTS_NAME, Evaluation, Judgement, SuiteScores
from pipeline.decide.comparison import DEGENERATE, Comparison, Former, Opinion, Suite
from pipeline.decide.statistics import Floats
from pipeline.errors import StepFailed
from pipeline.metrics.registry import METRICS

EVALUATE_AGAIN = "evaluate again: dropforge retry RUN --from evaluate"
_ROLES = ("candidate", "champion")


def read_comparison(root: Path, report: Evaluation, judgement: Judgement | None) -> Comparison:
    """
    Return what the report's files below `root` hold.

    Raises `StepFailed` if the files are not the report's, or hold a score that is no number.
    """
    folder = root / report.folder
    lines = list(durable.read_jsonl(folder / "records.jsonl"))
    if len({line["id"] for line in lines}) != report.records or len(lines) != report.records:
        message = f"the report speaks of {report.records} records and its file holds {len(lines)}"
        raise StepFailed(message, EVALUATE_AGAIN)
    own = compare(report.metric, lines)
    former = []
    for one in report.former:
        scores = {line["id"]: _finite(line["score"]) for line in durable.read_jsonl(folder / one.file)}
        former.append(Former(one.generation, np.array([scores.get(name, np.nan) for name in own.ids])))
    return replace(
        own,
        suites=tuple(_suite(folder, one) for one in report.suites),
        held_to_base=report.base_model_id is not None,
        former=tuple(former),
        opinion=None if judgement is None else _opinion(root, judgement),
    )


def _suite(folder: Path, found: SuiteScores) -> Suite:
    items = sorted(durable.read_jsonl(folder / found.file), key=lambda line: str(line["id"]))
    pairs = np.array([[_finite(item[role]) for role in ("candidate", "champion")] for item in items], dtype=np.float64)
    base = None if found.base is None else np.array([_finite(item["base"]) for item in items], dtype=np.float64)
    collapsed = {role: tuple(item["collapsed"][role] for item in items) for role in items[0].get("collapsed", {})}
    categories = tuple(item["category"] for item in items)
    return Suite(found.name, pairs.reshape(-1, 2), base, categories, collapsed or None)


def _opinion(root: Path, judgement: Judgement) -> Opinion:
    path = root / judgement.folder / JUDGEMENTS_NAME
    results = {str(line["id"]): str(line["result"]) for line in durable.read_jsonl(path)} if path.is_file() else {}
    if len(results) != judgement.records:
        message = f"the judgement speaks of {judgement.records} records and its file holds {len(results)}"
        raise StepFailed(message, "ask the judge again: dropforge retry RUN --from judge")
    return Opinion(judgement, results)


def compare(metric: str, lines: Sequence[Mapping[str, Any]]) -> Comparison:
    """
    Return the comparison that lines of records.jsonl make, in any order.

    Raises `StepFailed` if they were scored by different metrics, or a score is no finite number.
    """
    lines = sorted(lines, key=lambda line: str(line["id"]))
    names = _metrics(metric, lines)
    kinds = {tag for line in lines for tag in line["tags"]}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(line["group"] for line in lines))}
    return Comparison(
        metric=metric,
        ids=tuple(str(line["id"]) for line in lines),
        scores={name: _pair(lines, lambda side, name=name: _finite(side["scores"].get(name))) for name in names},
        drops=np.array([line["drop"] for line in lines], dtype=np.int64),
        pinned=np.array([line["pinned"] for line in lines], dtype=np.bool_),
        groups=np.array([numbers[line["group"]] for line in lines], dtype=np.int64),
        tags={tag: np.array([tag in line["tags"] for line in lines]) for tag in sorted(kinds)},
        nll=_nll(lines),
        degenerate={kind: _pair(lines, lambda side, kind=kind: kind in side["degenerate"]) for kind in DEGENERATE},
    )


def _metrics(metric: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metrics, sorted. Raises `StepFailed` if a line lacks one that says something about each record."""
    named = [[frozenset(line[role]["scores"]) for role in _ROLES] for line in lines]
    every = frozenset().union({metric}, *(names for both in named for names in both))
    some = {name for name in every if not all(name in names for both in named for names in both)}
    alike = all(own == other for own, other in named)
    if not alike or metric in some or every - METRICS.keys() or any(METRICS[name].applies is None for name in some):
        raise StepFailed(f"the answers were not all scored by the same metrics, {metric} among them", EVALUATE_AGAIN)
    return sorted(every)


def _pair(lines: Sequence[Mapping[str, Any]], of: Any) -> Floats:
    rows = [[of(line[role]) for role in _ROLES] for line in lines]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _nll(lines: Sequence[Mapping[str, Any]]) -> tuple[Floats, Floats]:
    # What JSON has no number for is null in the file.
    sums = _pair(lines, lambda side: np.nan if side["nll_sum"] is None else side["nll_sum"])
    return sums, _pair(lines, lambda side: side["nll_tokens"])


def _finite(score: float | None) -> float:
    """Return a score, NaN for none. Raises `StepFailed` if it is not finite."""
    if score is None:
        return np.nan
    if not np.isfinite(score):
        raise StepFailed("a record's score is not a finite number", EVALUATE_AGAIN)
    return score
