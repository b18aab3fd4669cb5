"""
The scores of candidate and champion on the same records, sorted by id, as arrays from the score files.

A pair of columns has the shape (records, 2): candidate, champion. A score that was not measured is NaN. Records that
are paraphrases of each other are one group, and one unit of every test.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import durable
from pipeline.artifacts import JUDGEMENTS_NAME, RECORDS_NAME, Evaluation, Judgement, SuiteScores
from pipeline.decide.policy import CHAMPION_SHARE
from pipeline.decide.statistics import Floats
from pipeline.errors import StepFailed
from pipeline.metrics.degenerate import DEGENERATE

Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
_EVALUATE_AGAIN = "evaluate again: dropforge retry RUN --from evaluate"
_ROLES = ("candidate", "champion")
#: What reading another run's scores may raise if they are damaged or gone.
DAMAGES = (OSError, KeyError, TypeError, ValueError, StepFailed)


@dataclass(frozen=True)
class Suite:
    """Both models' scores on one suite of general abilities; `scores` has the shape (items, 2), 0 to 1."""

    name: str
    scores: Floats
    base: Floats | None = None
    """The base model's on the same items; `None` if it is the champion."""
    collapsed: Mapping[str, tuple[str, ...]] | None = None
    """By model (candidate, champion, base), the kind of collapse per free answer, or ""; `None` for other suites."""


@dataclass(frozen=True)
class Opinion:
    """A judge model's opinion on the records that it compared."""

    judgement: Judgement
    results: Mapping[str, str]
    """By the record's id: win, loss, tie, inconsistent or failed."""


def count_results(results: Collection[str]) -> dict[str, int]:
    """Return the counts of a `Judgement` by field, of results as in `Opinion`; an inconsistent one is a tie, too."""
    counts = Counter(results)
    return {
        "records": len(results),
        "wins": counts["win"],
        "losses": counts["loss"],
        "ties": counts["tie"] + counts["inconsistent"],
        "inconsistent": counts["inconsistent"],
        "failed": counts["failed"],
    }


@dataclass(frozen=True)
class Comparison:
    """Both models' scores on the same records, with each record's drop, group and tags."""

    metric: str
    ids: tuple[str, ...]
    """Sorted, so that nothing depends on the order of the records."""
    scores: Mapping[str, Floats]
    """A pair of columns by metric, 0 to 1; the primary one is among them and was measured everywhere."""
    drops: Places
    pinned: Flags
    groups: Places
    """The number of each record's group, from 0."""
    nll: tuple[Floats, Floats]
    """Summed negative log-likelihood of the references in nats, and the tokens: two pairs of columns."""
    degenerate: Mapping[str, Floats]
    """A pair of columns of 0 or 1 by kind: empty, truncated, looping."""
    tags: Mapping[str, Flags] = field(default_factory=dict)
    suites: tuple[Suite, ...] = ()
    former: Mapping[int, Floats] = field(default_factory=dict)
    """Former champions' primary scores by generation, 0 to 1, NaN on records that they did not answer."""
    opinion: Opinion | None = None

    @cached_property
    def alone(self) -> bool:
        """Whether every group has exactly one record."""
        return np.unique(self.groups).size == self.groups.size

    def by_group(self, columns: Floats, mask: Flags | None = None) -> Floats:
        """
        Return the means of `columns`, shape (records, any), per group: (groups, any).

        Only records in `mask` (default: all) without NaN count; groups without such a record are left out.
        """
        kept: Flags = np.asarray(~np.isnan(columns).any(axis=1))
        kept = kept if mask is None else kept & mask
        if self.alone or not kept.any():
            return columns[kept]
        _, places, counts = np.unique(self.groups[kept], return_inverse=True, return_counts=True)
        return np.column_stack([np.bincount(places, weights=column) for column in columns[kept].T]) / counts[:, None]

    def sums(self, columns: Floats) -> Floats:
        """Return the sums of `columns`, shape (records, any), per group: (groups, any); a sum with NaN is NaN."""
        if self.alone:
            return columns
        places = np.unique(self.groups, return_inverse=True)[1]
        return np.column_stack([np.bincount(places, weights=column) for column in columns.T])

    def pairs(self, mask: Flags | None = None, metric: str | None = None) -> Floats:
        """
        Return both models' mean scores per group, shape (groups, 2): candidate, champion.

        `metric` is by default the primary metric. Only records in `mask` (default: all) where it was measured count.
        """
        return self.by_group(self.scores.get(metric or self.metric, np.empty((0, 2))), mask)

    def differences(self, mask: Flags | None = None) -> Floats:
        """Return candidate minus champion of the primary metric per group, shape (groups,); `mask` as in `pairs`."""
        pairs = self.pairs(mask)
        return np.asarray(pairs[:, 0] - pairs[:, 1])

    def part(self, mask: Flags) -> "Comparison":
        """Return the comparison on the records where `mask` is true; suites and opinion are unchanged."""
        return self if mask.all() else self.take(np.flatnonzero(mask), self.groups[mask])

    def take(self, rows: Places, groups: Places) -> "Comparison":
        """Return the comparison on the records at the indices `rows`, which may repeat; `groups` has their groups."""
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows.tolist()),
            scores={name: pair[rows] for name, pair in self.scores.items()},
            drops=self.drops[rows],
            pinned=self.pinned[rows],
            groups=groups,
            tags={tag: flags[rows] for tag, flags in self.tags.items()},
            nll=(self.nll[0][rows], self.nll[1][rows]),
            degenerate={kind: pair[rows] for kind, pair in self.degenerate.items()},
            former={generation: scores[rows] for generation, scores in self.former.items()},
        )


def pool(trial: Comparison, run: Comparison, control: Comparison | None = None) -> Comparison:
    """
    Return `trial` with means of two models' primary scores: of its candidate and the run's, of champion and control's.

    `run` and `control` are the comparisons whose candidates are taken. A record that one of these did not answer, or
    for another drop, keeps its score. The champion's weight is `CHAMPION_SHARE`, without a control 1.
    """
    candidate, champion = trial.scores[trial.metric].T
    candidate = _mean(candidate, _candidate_on(trial, run), 1 / 2)
    if control is not None:
        champion = _mean(champion, _candidate_on(trial, control), CHAMPION_SHARE)
    return replace(trial, scores={**trial.scores, trial.metric: np.column_stack((candidate, champion))})


def _mean(scores: Floats, others: Floats, share: float) -> Floats:
    return np.where(np.isnan(others), scores, share * scores + (1 - share) * others)


def _candidate_on(comparison: Comparison, other: Comparison) -> Floats:
    scores = other.scores[other.metric][:, 0]
    known = dict(zip(zip(other.ids, other.drops.tolist(), strict=True), scores, strict=True))
    return np.array([known.get(key, np.nan) for key in zip(comparison.ids, comparison.drops.tolist(), strict=True)])


def read_comparison(root: Path, report: Evaluation, judgement: Judgement | None) -> Comparison:
    """
    Read the comparison from an evaluation's files below `root`, and the judge's results if there is a `judgement`.

    Raises `StepFailed` if the number of records is not that of the report or judgement, others of `DAMAGES` if a file
    is damaged or missing. A record without a score has NaN.
    """
    folder = root / report.folder
    comparison = compare(report.metric, read_lines(root, report))
    former = {}
    for scored in report.former:
        scores = {line["id"]: line["score"] for line in durable.read_jsonl(folder / scored.file)}
        former[scored.generation] = np.array([scores.get(name, np.nan) for name in comparison.ids])
    return replace(
        comparison,
        suites=tuple(_suite(folder, suite) for suite in report.suites),
        former=former,
        opinion=None if judgement is None else _opinion(root, judgement),
    )


def read_lines(root: Path, report: Evaluation) -> list[dict[str, Any]]:
    """Return an evaluation's lines of records.jsonl. Raises `StepFailed` unless their ids are as many as it reports."""
    lines = list(durable.read_jsonl(root / report.folder / RECORDS_NAME))
    if len({line["id"] for line in lines}) != report.records or len(lines) != report.records:
        raise StepFailed(
            f"the report speaks of {report.records} records and its file holds {len(lines)}", _EVALUATE_AGAIN
        )
    return lines


def _suite(folder: Path, scores: SuiteScores) -> Suite:
    items = sorted(durable.read_jsonl(folder / scores.file), key=lambda line: str(line["id"]))
    base = None if scores.base is None else np.array([item["base"] for item in items], dtype=np.float64)
    collapsed = {role: tuple(item["collapsed"][role] for item in items) for role in items[0].get("collapsed", {})}
    return Suite(scores.name, _pair(items, float), base, collapsed or None)


def _opinion(root: Path, judgement: Judgement) -> Opinion:
    path = root / judgement.folder / JUDGEMENTS_NAME
    results = {str(line["id"]): str(line["result"]) for line in durable.read_jsonl(path)} if path.is_file() else {}
    if len(results) != judgement.records:
        raise StepFailed(
            f"the judgement speaks of {judgement.records} records and its file holds {len(results)}",
            "ask the judge again: dropforge retry RUN --from judge",
        )
    return Opinion(judgement, results)


def compare(metric: str, lines: Sequence[Mapping[str, Any]]) -> Comparison:
    """Return the comparison of records.jsonl's lines, in any order, without suites and former; `metric` is primary."""
    lines = sorted(lines, key=lambda line: str(line["id"]))
    names = sorted({metric, *(name for line in lines for role in _ROLES for name in line[role]["scores"])})
    kinds = {tag for line in lines for tag in line["tags"]}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(line["group"] for line in lines))}
    return Comparison(
        metric=metric,
        ids=tuple(str(line["id"]) for line in lines),
        scores={name: _pair(lines, lambda side, name=name: side["scores"].get(name)) for name in names},
        drops=np.array([line["drop"] for line in lines], dtype=np.int64),
        pinned=np.array([line["pinned"] for line in lines], dtype=np.bool_),
        groups=np.array([numbers[line["group"]] for line in lines], dtype=np.int64),
        tags={tag: np.array([tag in line["tags"] for line in lines]) for tag in sorted(kinds)},
        nll=(_pair(lines, lambda side: side["nll_sum"]), _pair(lines, lambda side: side["nll_tokens"])),
        degenerate={kind: _pair(lines, lambda side, kind=kind: kind in side["degenerate"]) for kind in DEGENERATE},
    )


def _pair(lines: Sequence[Mapping[str, Any]], of: Any) -> Floats:
    """Return what `of` returns for candidate and champion of each line, (lines, 2); `None`, not measured, is NaN."""
    rows = [[of(line[role]) for role in _ROLES] for line in lines]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)
