"""Find the rows of a suspected drop that are most like the older held-out records on which its trial lost."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, islice
from typing import Any

from pipeline.artifacts import AnswerPair
from pipeline.metrics.tokens import shingles, tokens
from pipeline.models.template import fold

_MOST_PAIRS = 8
#: Word runs in more than this share of the records are the form of the task and are not compared.
_FORM = 0.05
Rows = Iterable[Mapping[str, Any]]


def pair_lost(lines: Rows, metric: str, lost: Collection[int], rows: Rows, suspect: int) -> tuple[AnswerPair, ...]:
    """
    Return lost records with their most similar row of the drop `suspect`, the most similar first, at most eight.

    `lines` are those of records.jsonl, `rows` those of train.jsonl. A record is lost if the candidate scored less than
    the champion by `metric` and it is of a drop in `lost` (if empty, of any but the suspect). Similarity is the Jaccard
    index of the prompts' 3-word runs; records without a common run are left out, and each row is shown once.
    """
    texts = [(line, _runs(line)) for line in lines]
    seen = Counter(chain.from_iterable(runs for _, runs in texts))
    form = {run for run, number in seen.items() if number > _FORM * len(texts)}
    found = [
        (line, runs - form)
        for line, runs in texts
        if (line["drop"] in lost if lost else line["drop"] != suspect)
        and line["candidate"]["scores"][metric] < line["champion"]["scores"][metric]
    ]
    index: dict[int, list[int]] = {}
    for number, (_, runs) in enumerate(found):
        for run in runs:
            index.setdefault(run, []).append(number)
    best: dict[int, tuple[float, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("drop") != suspect:
            continue
        own = _runs(row) - form
        for number, common in Counter(chain.from_iterable(index[run] for run in own & index.keys())).items():
            similarity = common / (len(own) + len(found[number][1]) - common)
            if number not in best or similarity > best[number][0]:
                best[number] = similarity, row
    pairs: dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for number in sorted(best, key=lambda number: (-best[number][0], found[number][0]["id"])):
        row = best[number][1]
        pairs.setdefault(id(row), (found[number][0], row))
    return tuple(
        AnswerPair(
            old_drop=line["drop"],
            old_prompt=line["input"] or line["instruction"],
            old_answer=line["references"][0],
            new_drop=row["drop"],
            new_prompt=row["input"] or row["instruction"],
            new_answer=row["output"],
        )
        for line, row in islice(pairs.values(), _MOST_PAIRS)
    )


def _runs(row: Mapping[str, Any]) -> set[int]:
    return shingles(tokens(fold(row["instruction"], row["input"])))
