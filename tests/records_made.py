"""Comparisons that are made, never measured, so that a test can say what is true of its candidate."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from pipeline.artifacts import Drop, Evaluation, ModelRef, Verdict
from pipeline.config import GateConfig, RunConfig
from pipeline.decide.comparison import Comparison, Suite, compare
from pipeline.decide.statistics import Floats
from pipeline.metrics.degenerate import DEGENERATE
from pipeline.report.story import tell
from tests.made_artifacts import dataset_of, made_spec, report_of


def lines_of(candidate: object, champion: object, metric: str = "exact_match") -> list[dict[str, Any]]:
    """Return lines of records.jsonl with these scores (0 to 1) and nothing degenerate, all of drop 1."""
    columns = np.asarray(candidate, dtype=float), np.asarray(champion, dtype=float)

    def side(score: float) -> dict[str, Any]:
        return {
            "text": "x",
            "tokens": 3,
            "scores": {metric: float(score)},
            "nll_sum": 4.0,
            "nll_tokens": 4,
            "degenerate": [],
        }

    return [
        {
            "id": f"{place:06x}",
            "group": f"{place:06x}",
            "drop": 1,
            "pinned": False,
            "tags": [],
            "instruction": f"question {place}",
            "input": "",
            "references": ["x"],
            "candidate": side(own),
            "champion": side(other),
        }
        for place, (own, other) in enumerate(zip(*columns, strict=True))
    ]


def paired(candidate: object, champion: object, metric: str = "exact_match") -> Comparison:
    """Return a comparison with these scores and nothing else."""
    return compare(metric, lines_of(candidate, champion, metric))


def yes_or_no(wins: int, losses: int, ties: int) -> list[dict[str, Any]]:
    """Return lines with so many records won, lost and equal, in this order."""
    return lines_of([1] * wins + [0] * losses + [1] * ties, [0] * wins + [1] * losses + [1] * ties)


def in_drops(*parts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the drops 1, 2 and so on, none of them in a group with another."""
    lines = [{**line, "drop": drop} for drop, part in enumerate(parts, 1) for line in part]
    for place, line in enumerate(lines):
        line["id"] = line["group"] = f"{place:06x}"
    return lines


def world(metric: str, seed: int, *, size: int = 500) -> Comparison:
    """Return a comparison as two nights would give it: by chance alike models on five drops."""
    random = np.random.default_rng(seed)
    noise = 0.0 if metric in {"exact_match", "json_valid"} else 0.134
    ability = random.beta(2, 3, size) if noise else random.beta(0.43, 0.286, size)

    def answers() -> Floats:
        luck = random.random(size)
        if noise:
            return np.clip(ability + noise * special.ndtri(luck), 0, 1)
        return (luck < ability).astype(float)

    champion, candidate = answers(), answers()
    items = random.beta(0.2, 0.2, 300)
    losses = random.gamma(4, 0.3, size)
    return Comparison(
        metric=metric,
        ids=tuple(f"{place:06x}" for place in range(size)),
        scores={metric: np.column_stack((candidate, champion))},
        drops=np.arange(size) % 5 + 1,
        pinned=np.zeros(size, dtype=np.bool_),
        groups=np.arange(size),
        nll=(10 * (losses[:, None] + random.normal(0, 0.2, (size, 2))), np.full((size, 2), 10.0)),
        degenerate={kind: (random.random((size, 2)) < 0.01).astype(float) for kind in DEGENERATE},
        suites=(Suite("builtin", (random.random((300, 2)) < items[:, None]).astype(float)),),
    )


def evaluation_of(folder: Path, lines: Sequence[Mapping[str, Any]], **more: Any) -> Evaluation:
    """Write these records into the new folder `folder`; return the evaluation that left them there."""
    folder.mkdir(exist_ok=True)
    write_lines(folder / "records.jsonl", lines)
    return report_of(len(lines), **{"folder": folder.name, **more})


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def story_text(verdict: Verdict, track: str = "default", **facts: Any) -> str:
    """Return all that the story of a verdict says: `facts` are the data set's, and `gate` that of the settings."""
    config = RunConfig(
        track=track, base_model="/b", base_model_id="b", salt="s", gate=facts.pop("gate", None) or GateConfig()
    )
    drops = tuple(
        Drop(id=drop, sha256="0", name=name, path=name, role="heldout", rows=1, records=1)
        for drop, name in ((1, "old.jsonl"), (2, "new.jsonl"))
    )
    data = dataset_of(verdict.records, **facts, metric=verdict.metric)
    champion = ModelRef(model_id="old", path="models/old", generation=3, drops=(1,))
    spec = made_spec(Path("/"), "decide", config, run=7, drops=drops, champion=champion)
    story = tell(verdict, data, None, spec)
    steps = [f"{step.words} {step.command or ''}" for step in story.next_steps]
    return " ".join((story.headline, *story.why, *steps))
