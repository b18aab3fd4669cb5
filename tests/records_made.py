"""Comparisons that are made, never measured, so that a test can say what is true of its candidate."""

from typing import Any

import numpy as np

from pipeline.gate.comparison import Comparison, compare


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
            "drop": 1,
            "pinned": False,
            "replaced": False,
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
