"""Build the evidence card from the published artifacts: report.json and report.html, for every verdict."""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

from pipeline import durable
from pipeline.artifacts import (
    RECORDS_NAME,
    Adapter,
    AnswerPair,
    Artifact,
    Dataset,
    Evaluation,
    Judgement,
    Model,
    Verdict,
)
from pipeline.contract import Attempt
from pipeline.metrics.registry import METRICS
from pipeline.metrics.tokens import shingles, tokens
from pipeline.models.template import fold, shown_prompt, transcript
from pipeline.report.facts import Answer, Example, Report
from pipeline.report.page import MOST_CHARACTERS, write_files
from pipeline.report.story import tell
from pipeline.words import cut_start

_FOLDER_NAME = "report"
#: Records of a card that became worse, and as many that became better.
_MOST_EXAMPLES = 10
_MOST_PAIRS = 8
#: Word runs in more than this share of the records are the form of the task and are not compared.
_FORM = 0.05
Rows = Iterable[Mapping[str, Any]]
A = TypeVar("A", bound=Artifact)


def write_report(attempt: Attempt, verdict: Verdict) -> str:
    """
    Write report.json and report.html into the attempt's new folder `report`; return it, relative to the work folder.

    The card contains the artifacts that the run's earlier steps published. Raises `FileExistsError` if the folder
    exists, `StepFailed` if `prepare` has published none.
    """
    folder = attempt.make_folder(_FOLDER_NAME)
    path = attempt.relative(folder)
    write_files(folder, _report(attempt, verdict.model_copy(update={"report": path})))
    return path


def _report(attempt: Attempt, verdict: Verdict) -> Report:
    dataset, config = attempt.load(Dataset), attempt.config
    adapter, evaluation = _published(attempt, Adapter), _published(attempt, Evaluation)
    regressions, gains = pick(_records(attempt, evaluation), verdict.metric)
    return Report(
        run=attempt.spec.run,
        track=config.track,
        story=tell(verdict, dataset, evaluation, attempt.spec, adapter),
        metric_title=METRICS[verdict.metric].title,
        verdict=verdict,
        drops=attempt.spec.drops,
        dataset=dataset,
        adapter=adapter,
        model=_published(attempt, Model),
        evaluation=evaluation,
        judgement=_published(attempt, Judgement),
        regressions=regressions,
        gains=gains,
        lost_pairs=_lost_pairs(attempt, verdict, dataset, evaluation),
        settings=config.model_dump(mode="json"),
    )


def _published(attempt: Attempt, kind: type[A]) -> A | None:
    return attempt.load(kind) if kind.step in attempt.spec.inputs else None


def _records(attempt: Attempt, evaluation: Evaluation | None) -> Iterator[dict[str, Any]]:
    if evaluation is not None:
        yield from durable.read_jsonl(attempt.path(evaluation.folder) / RECORDS_NAME)


def _lost_pairs(
    attempt: Attempt, verdict: Verdict, dataset: Dataset, evaluation: Evaluation | None
) -> tuple[AnswerPair, ...]:
    suspect, rows = attempt.spec.suspect, attempt.path(dataset.folder) / "train.jsonl"
    # The data of an ended run, whose verdict is made again, may be gone.
    if suspect is None or not verdict.blames_new_drops or not rows.is_file():
        return ()
    lines, trained = _records(attempt, evaluation), durable.read_jsonl(rows)
    return pair_lost(lines, verdict.metric, verdict.lost_drops, trained, suspect)


def pair_lost(lines: Rows, metric: str, lost: Collection[int], rows: Rows, suspect: int) -> tuple[AnswerPair, ...]:
    """
    Return lost records with their most similar row of the drop `suspect`, the most similar first, at most eight.

    `lines` are those of records.jsonl, `rows` those of train.jsonl. A record is lost if the candidate scored less than
    the champion by `metric` and it is of a drop in `lost` (if empty, of any but the suspect). Similarity is the Jaccard
    index of the prompts' 3-word runs, without those in more than 5 % of the records; records without a common run are
    left out, and each row is shown once.
    """
    texts = [(line, _runs(line)) for line in lines]
    seen = Counter(chain.from_iterable(runs for _, runs in texts))
    form = {run for run, number in seen.items() if number > _FORM * len(texts)}
    lost_records = [
        (line, runs - form)
        for line, runs in texts
        if (line["drop"] in lost if lost else line["drop"] != suspect)
        and line["candidate"]["scores"][metric] < line["champion"]["scores"][metric]
    ]
    tried = ((row, _runs(row) - form) for row in rows if row.get("drop") == suspect)
    best = _most_similar([runs for _, runs in lost_records], tried)
    pairs: dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for number in sorted(best, key=lambda number: (-best[number][0], lost_records[number][0]["id"])):
        row = best[number][1]
        pairs.setdefault(id(row), (lost_records[number][0], row))
    return tuple(
        AnswerPair(
            old_drop=line["drop"],
            old_prompt=_shown(line),
            old_answer=line["references"][0],
            new_drop=row["drop"],
            new_prompt=_shown(row),
            new_answer=row["output"],
        )
        for line, row in islice(pairs.values(), _MOST_PAIRS)
    )


def _shown(row: Mapping[str, Any]) -> str:
    return shown_prompt(row["instruction"], row["input"], row.get("turns", ()))


def _most_similar(
    records: Sequence[set[int]], rows: Iterable[tuple[Mapping[str, Any], set[int]]]
) -> dict[int, tuple[float, Mapping[str, Any]]]:
    """Return, by a record's index in `records`, its highest Jaccard index with a row, above 0, and that row."""
    index: dict[int, list[int]] = {}
    for number, runs in enumerate(records):
        for run in runs:
            index.setdefault(run, []).append(number)
    best: dict[int, tuple[float, Mapping[str, Any]]] = {}
    for row, row_runs in rows:
        for number, common in Counter(chain.from_iterable(index[run] for run in row_runs & index.keys())).items():
            similarity = common / (len(row_runs) + len(records[number]) - common)
            if number not in best or similarity > best[number][0]:
                best[number] = similarity, row
    return best


def _runs(row: Mapping[str, Any]) -> set[int]:
    return shingles(tokens(fold(row["instruction"], row["input"])))


def pick(lines: Iterable[Mapping[str, Any]], metric: str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """
    Return the worst regressions and the best gains by `metric` among the `lines` of records.jsonl, at most ten each.

    The largest come first; records with equal scores of both models are in neither, and long texts are cut. Records of
    equal difference (all of them, with exact match) are ordered by id, so that the choice does not depend on the order
    of the lines.
    """
    changes = [(line["candidate"]["scores"][metric] - line["champion"]["scores"][metric], line) for line in lines]
    worst = heapq.nsmallest(_MOST_EXAMPLES, (x for x in changes if x[0] < 0), key=lambda x: (x[0], x[1]["id"]))
    best = heapq.nsmallest(_MOST_EXAMPLES, (x for x in changes if x[0] > 0), key=lambda x: (-x[0], x[1]["id"]))
    regressions, gains = ([_example(line, metric) for _, line in chosen] for chosen in (worst, best))
    return tuple(regressions), tuple(gains)


def _example(line: Mapping[str, Any], metric: str) -> Example:
    new, old = (_answer(line[role], metric) for role in ("candidate", "champion"))
    return Example(
        id=line["id"],
        drop=line["drop"],
        tags=tuple(line["tags"]),
        earlier=cut_start(transcript(line.get("turns", ())), MOST_CHARACTERS),
        instruction=_cut(line["instruction"]),
        input=_cut(line["input"]),
        references=tuple(_cut(reference) for reference in line["references"]),
        candidate=new,
        champion=old,
        difference=new.score - old.score,
    )


def _answer(given: Mapping[str, Any], metric: str) -> Answer:
    text, score = given["text"], 100 * given["scores"][metric]
    return Answer(text=_cut(text), characters=len(text), score=score, degenerate=tuple(given["degenerate"]))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
