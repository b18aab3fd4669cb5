"""What the gate compares: candidate and champion on the same records, sorted by id, a column for each fact."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import durable
from pipeline.artifacts import Evaluation, Judgement, SuiteScores
from pipeline.errors import StepFailed
from pipeline.gate.statistics import Floats
from pipeline.metrics.registry import METRICS

Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
ROLES = ("candidate", "champion")
#: In the judgement's folder, a line a record.
JUDGEMENTS_NAME = "judgements.jsonl"
DEGENERATE = ("empty", "truncated", "looping")
_AGAIN = "evaluate again: dropforge retry RUN --from evaluate"


@dataclass(frozen=True)
class Suite:
    """Both models on one suite of general abilities; `scores` has the shape (items, 2), 0 to 1."""

    name: str
    scores: Floats
    base: Floats | None = None
    """The base model's on the same items; `None` if it is the champion, or was not measured."""


@dataclass(frozen=True)
class Former:
    """A former champion's scores, 0 to 1, on the records at `places`."""

    generation: int
    places: Places
    scores: Floats


@dataclass(frozen=True)
class Opinion:
    """What a language model said of the records that it was asked about."""

    judgement: Judgement
    results: Mapping[str, str]
    """By the record's id: win, loss, tie, inconsistent or failed."""

    def on(self, ids: Iterable[str]) -> Judgement:
        """Return the judgement counted over those of its records that are among `ids`."""
        found = [self.results[name] for name in ids if name in self.results]
        return self.judgement.model_copy(update=count_results(found))


def count_results(results: Collection[str]) -> dict[str, int]:
    """Return the counts of a `Judgement` from what was said of each record."""
    counts = Counter(results)
    return {
        "records": len(results), "wins": counts["win"], "losses": counts["loss"],
        "ties": counts["tie"] + counts["inconsistent"], "inconsistent": counts["inconsistent"],
        "failed": counts["failed"],
    }  # fmt: skip


@dataclass(frozen=True)
class Partial:
    """A metric that says something about the records at `places` alone; `scores` has the shape (places, 2), 0 to 1."""

    places: Places
    scores: Floats


@dataclass(frozen=True)
class Comparison:
    """Both models on the same records. A pair of columns has the shape (records, 2): candidate, champion."""

    metric: str
    ids: tuple[str, ...]
    """Sorted, so that nothing depends on the order of the records."""
    scores: Mapping[str, Floats]
    """A pair of columns by metric, 0 to 1; the primary one is among them."""
    drops: npt.NDArray[np.int64]
    pinned: Flags
    replaced: Flags
    """Pinned records to which their drop gave other references than an earlier one."""
    tags: Mapping[str, Flags] = field(default_factory=dict)
    partial: Mapping[str, Partial] = field(default_factory=dict)
    """The metrics that were measured on some of the records only."""
    nll: tuple[Floats, Floats] | None = None
    """Summed negative log-likelihood of the references in nats, and the tokens: two pairs of columns."""
    mean_nll: tuple[float, float] = (0.0, 0.0)
    """Of all records in nats a token, for records that have no `nll` of their own."""
    degenerate: Mapping[str, Floats] = field(default_factory=dict)
    """A pair of columns of 0 or 1 by kind: empty, truncated, looping."""
    suites: tuple[Suite, ...] = ()
    held_to_base: bool = False
    """Whether the suites are held against the base model: not where it is the champion."""
    former: tuple[Former, ...] = ()
    seconds_per_answer: tuple[float | None, float | None] = (None, None)
    size_bytes: tuple[int, int] = (0, 0)
    opinion: Opinion | None = None

    def pair(self, metric: str) -> Floats:
        """Return a metric's pair of columns on the records that it was measured on: none of them, shape (0, 2)."""
        partial = self.partial.get(metric)
        return self.scores.get(metric, np.empty((0, 2)) if partial is None else partial.scores)

    def differences(self, metric: str | None = None) -> Floats:
        """Return a metric's candidate minus champion, a record that has it each, turned so that more is better."""
        name = metric or self.metric
        pair = self.pair(name)
        known = METRICS.get(name)
        return np.asarray(pair[:, 0] - pair[:, 1]) * (1 if known is None or known.higher_is_better else -1)

    def part(self, mask: Flags) -> "Comparison":
        """Return the comparison on the records that `mask` names; suites and costs stay as they are."""
        if mask.all():
            return self
        new_place = np.cumsum(mask) - 1
        former = [(one, mask[one.places]) for one in self.former]
        partial = {name: (one, mask[one.places]) for name, one in self.partial.items()}
        return replace(
            self,
            ids=tuple(name for name, kept in zip(self.ids, mask.tolist(), strict=True) if kept),
            scores={name: pair[mask] for name, pair in self.scores.items()},
            partial={
                name: Partial(new_place[one.places[kept]], one.scores[kept]) for name, (one, kept) in partial.items()
            },
            drops=self.drops[mask],
            pinned=self.pinned[mask],
            replaced=self.replaced[mask],
            tags={tag: flags[mask] for tag, flags in self.tags.items()},
            nll=None if self.nll is None else (self.nll[0][mask], self.nll[1][mask]),
            degenerate={kind: pair[mask] for kind, pair in self.degenerate.items()},
            former=tuple(Former(one.generation, new_place[one.places[kept]], one.scores[kept]) for one, kept in former),
        )


def read_comparison(root: Path, report: Evaluation, judgement: Judgement | None) -> Comparison:
    """
    Return what the report's files below `root` hold.

    Raises `StepFailed` if the files are not the report's, or hold a score that is no number.
    """
    folder = root / report.folder
    lines = list(durable.read_jsonl(folder / "records.jsonl"))
    if len({line["id"] for line in lines}) != report.records or len(lines) != report.records:
        message = f"the report speaks of {report.records} records and its file holds {len(lines)}"
        raise StepFailed(message, _AGAIN)
    own = compare(report.metric, lines)
    places = {name: place for place, name in enumerate(own.ids)}
    former = []
    for one in report.former:
        found = sorted((places[line["id"]], line["score"]) for line in durable.read_jsonl(folder / one.file)
                       if line["id"] in places)  # fmt: skip
        columns = np.array(found, dtype=np.float64).reshape(-1, 2)
        former.append(Former(one.generation, columns[:, 0].astype(np.int64), _finite(columns[:, 1])))
    return replace(
        own,
        mean_nll=(report.candidate.nll, report.champion.nll),
        suites=tuple(_suite(folder, one) for one in report.suites),
        held_to_base=report.base_model_id is not None,
        former=tuple(former),
        seconds_per_answer=(report.candidate.seconds_per_answer, report.champion.seconds_per_answer),
        size_bytes=(report.candidate.size_bytes, report.champion.size_bytes),
        opinion=None if judgement is None else _opinion(root, judgement),
    )


def compare(metric: str, lines: Sequence[Mapping[str, Any]]) -> Comparison:
    """Return the comparison that lines of records.jsonl make, in any order. Raises `StepFailed` as reading does."""
    lines = sorted(lines, key=lambda line: str(line["id"]))
    whole, some = _metrics(metric, lines)
    kinds = {tag for line in lines for tag in line["tags"]}
    return Comparison(
        metric=metric,
        ids=tuple(str(line["id"]) for line in lines),
        scores={name: _scores(lines, name) for name in whole},
        partial={name: _partial(lines, name) for name in some},
        drops=np.array([line["drop"] for line in lines], dtype=np.int64),
        pinned=np.array([line["pinned"] for line in lines], dtype=np.bool_),
        replaced=np.array([line["replaced"] for line in lines], dtype=np.bool_),
        tags={tag: np.array([tag in line["tags"] for line in lines]) for tag in sorted(kinds)},
        nll=_nll(lines),
        degenerate={
            kind: _pair(lines, lambda side, kind=kind: kind in side["degenerate"]) for kind in DEGENERATE
        } if _have(lines, "degenerate") else {},
    )  # fmt: skip


def _metrics(metric: str, lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the metrics of all lines and those of some. Raises `StepFailed` if a line lacks what it must have."""
    named = [[frozenset(line[role]["scores"]) for role in ROLES] for line in lines]
    every = frozenset().union({metric}, *(names for both in named for names in both))
    whole = {name for name in every if all(name in names for both in named for names in both)}
    some = every - whole
    alike = all(own == other for own, other in named)
    if not alike or metric in some or any(name not in METRICS or METRICS[name].applies is None for name in some):
        message = f"the answers were not all scored by the same metrics, {metric} among them"
        raise StepFailed(message, _AGAIN)
    return sorted(whole), sorted(some)


def _scores(lines: Sequence[Mapping[str, Any]], name: str) -> Floats:
    return _finite(_pair(lines, lambda side: side["scores"][name]))


def _partial(lines: Sequence[Mapping[str, Any]], name: str) -> Partial:
    places = [place for place, line in enumerate(lines) if name in line[ROLES[0]]["scores"]]
    return Partial(np.array(places, dtype=np.int64), _scores([lines[place] for place in places], name))


def _pair(lines: Sequence[Mapping[str, Any]], of: Any) -> Floats:
    rows = [[of(line[role]) for role in ROLES] for line in lines]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _have(lines: Sequence[Mapping[str, Any]], name: str) -> bool:
    return bool(lines) and all(name in line[role] for line in lines for role in ROLES)


def _nll(lines: Sequence[Mapping[str, Any]]) -> tuple[Floats, Floats] | None:
    if not _have(lines, "nll_sum"):
        return None
    # What JSON has no number for is null in the file.
    sums = _pair(lines, lambda side: np.nan if side["nll_sum"] is None else side["nll_sum"])
    return sums, _pair(lines, lambda side: side["nll_tokens"])


def _suite(folder: Path, found: SuiteScores) -> Suite:
    items = sorted(durable.read_jsonl(folder / found.file), key=lambda line: str(line["id"]))
    pairs = np.array([[item[role] for role in ROLES] for item in items], dtype=np.float64).reshape(-1, 2)
    base = None if found.base is None else np.array([item["base"] for item in items], dtype=np.float64)
    return Suite(found.name, _finite(pairs), None if base is None else _finite(base))


def _opinion(root: Path, judgement: Judgement) -> Opinion:
    path = root / judgement.folder / JUDGEMENTS_NAME
    results = {str(line["id"]): str(line["result"]) for line in durable.read_jsonl(path)} if path.is_file() else {}
    if len(results) != judgement.records:
        message = f"the judgement speaks of {judgement.records} records and its file holds {len(results)}"
        raise StepFailed(message, "ask the judge again: dropforge retry RUN --from judge")
    return Opinion(judgement, results)


def _finite(scores: Floats) -> Floats:
    if not np.isfinite(scores).all():
        message = "a record's score is not a finite number"
        raise StepFailed(message, _AGAIN)
    return scores
