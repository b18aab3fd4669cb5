"""The records that say most about a candidate: the ten that it answered worst and best beside the champion."""

import heapq
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.report.facts import Answer, Example

MOST = 10
#: Characters of a text that are kept: with twenty records of four texts a page stays readable in mail.
MOST_CHARACTERS = 3000


def pick(lines: Iterable[Mapping[str, Any]], metric: str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """
    Return the worst regressions and the best gains of records.jsonl, at most ten each, the largest first.

    Records of equal difference (all of them, with exact match) are ordered by the other metrics, then by id, so that
    the choice does not depend on the order of the lines.
    """
    ranked = [(_rank(line, metric), line) for line in lines]
    worst = heapq.nsmallest(MOST, (one for one in ranked if one[0][0] < 0), key=lambda one: one[0])
    best = heapq.nsmallest(
        MOST, (one for one in ranked if one[0][0] > 0), key=lambda one: (-one[0][0], -one[0][1], one[0][2])
    )
    regressions, gains = ([_example(line, metric) for _, line in found] for found in (worst, best))
    return tuple(regressions), tuple(gains)


def _rank(line: Mapping[str, Any], metric: str) -> tuple[float, float, str]:
    new, old = line["candidate"]["scores"], line["champion"]["scores"]
    others = [name for name in new if name != metric and name in old]
    rest = sum(new[name] - old[name] for name in others) / len(others) if others else 0.0
    return new[metric] - old[metric], rest, line["id"]


def _example(line: Mapping[str, Any], metric: str) -> Example:
    new, old = (_answer(line[role], metric) for role in ("candidate", "champion"))
    return Example(
        id=line["id"],
        drop=line["drop"],
        tags=tuple(line["tags"]),
        instruction=cut(line["instruction"]),
        input=cut(line["input"]),
        references=tuple(cut(reference) for reference in line["references"]),
        candidate=new,
        champion=old,
        difference=new.score - old.score,
    )


def _answer(given: Mapping[str, Any], metric: str) -> Answer:
    text = given["text"]
    return Answer(
        text=cut(text), characters=len(text), score=100 * given["scores"][metric], degenerate=tuple(given["degenerate"])
    )


def cut(text: str) -> str:
    """Return a text, or its beginning with a sign that there was more."""
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
