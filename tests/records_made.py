"""Comparisons that are made, never measured, so that a test can say what is true of its candidate."""

from typing import Any

import numpy as np

from pipeline.artifacts import Dataset, Drop, ModelRef, Verdict
from pipeline.config import GateConfig, RunConfig
from pipeline.contract import StepSpec
from pipeline.gate.comparison import Comparison, compare
from pipeline.report.story import tell


def lines_of(candidate: object, champion: object, metric: str = "exact_match") -> list[dict[str, Any]]:
    """Return lines of records.jsonl with these scores (0 to 1) and nothing degenerate, all of drop 1."""
    columns = np.asarray(candidate, dtype=float), np.asarray(champion, dtype=float)

    def side(score: float) -> dict[str, Any]:
        return {
            "text": "x", "tokens": 3, "scores": {metric: float(score)}, "nll_sum": 4.0, "nll_tokens": 4,
            "degenerate": [],
        }  # fmt: skip

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


def story_text(verdict: Verdict, track: str = "default", **facts: Any) -> str:
    """Return all that the story of a verdict says: `facts` are the data set's, and `gate` that of the settings."""
    config = RunConfig(
        track=track, base_model="/b", base_model_id="b", salt="s", gate=facts.pop("gate", None) or GateConfig()
    )
    drops = tuple(
        Drop(id=drop, sha256="0", name=name, path=name, role="heldout", rows=1)
        for drop, name in ((1, "old.jsonl"), (2, "new.jsonl"))
    )
    data = Dataset(
        folder="d",
        train_rows=1,
        dev_rows=0,
        heldout_rows=verdict.records,
        heldout_groups=verdict.records,
        heldout_pinned=False,
        heldout_version="v",
        dataset_sha256="d",
        duplicates=0,
        replaced=0,
        removed_heldout=0,
        metric=verdict.metric,
        max_new_tokens=8,
    ).model_copy(update=facts)
    spec = StepSpec(
        run=7,
        step="decide",
        attempt=1,
        fence="f",
        root="/",
        folder="f",
        checkpoints="c",
        predictions="p",
        argv=(),
        env={},
        inputs={},
        drops=drops,
        champion=ModelRef(model_id="old", path="models/old", generation=3, drops=(1,)),
        config=config,
    )
    story = tell(verdict, data, None, spec)
    steps = [f"{step.words} {step.command or ''}" for step in story.next_steps]
    return " ".join((story.headline, *story.why, *steps))
