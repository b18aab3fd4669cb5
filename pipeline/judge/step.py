"""
The judge step (optional): a remote language model compares both models' answers, each pair in both orders.

It can only block a promotion, and never fails a run: an endpoint that is down, slow or unreadable is given up after a
while, and the judgement says for how many records there is no answer.
"""

import asyncio
import heapq
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import durable
from pipeline.artifacts import JUDGEMENTS_NAME, Evaluation, Judgement
from pipeline.contract import Attempt
from pipeline.decide.comparison import count_results
from pipeline.decide.slices import Known, judged_on
from pipeline.errors import StepFailed
from pipeline.evaluate.batch_log import BatchLog
from pipeline.judge.client import NoAnswerError
from pipeline.judge.session import SHOWN_REPLY, Judged, JudgeSession, Outcome, Pair
from pipeline.models.prompt import fold
from pipeline.words import count

#: In the attempt's folder `predictions`, which is kept until the run ends: replies may cost money.
REPLIES_NAME = "judge.replies.jsonl"


def judge(attempt: Attempt) -> Judgement:
    """
    Return the judge's wins, losses and ties on the records with the lowest ids, among those that the gate judges on.

    A line per record is written. Equal answers are a tie without a request. Replies of an interrupted attempt are read
    from its log. Raises `StepFailed` if the report's records cannot be read, `Interrupted` if stopped; never because of
    the endpoint.
    """
    report = attempt.load(Evaluation)
    config = attempt.config.judge
    pairs = _read_pairs(attempt, report)[: config.records]
    folder = attempt.make_folder("report")
    log = BatchLog(attempt.make_folder("predictions") / REPLIES_NAME, attempt.earlier(f"predictions/{REPLIES_NAME}"))
    session = JudgeSession(attempt, pairs, log)
    try:
        asyncio.run(session.hold())
    except NoAnswerError as error:
        session.gave_up = error.words
    finally:
        log.close()
    judged = {pair.id: session.judged.get(pair.id, Judged()) for pair in pairs}
    _write_judgements(folder / JUDGEMENTS_NAME, judged)
    counts = Counter(one.result for one in judged.values())
    _say(session, counts, len(pairs))
    return Judgement(
        folder=attempt.relative(folder),
        model=config.model,
        **count_results([one.result for one in judged.values()]),
    )


def _read_pairs(attempt: Attempt, report: Evaluation) -> list[Pair]:
    """Return the report's records that the gate judges on, those with the lowest ids first."""
    lines = list(durable.read_jsonl(attempt.path(report.folder) / "records.jsonl"))
    try:
        pairs = [_pair(line) for line in lines]
    except (KeyError, TypeError) as error:
        message = f"a record of the report lacks {error}"
        raise StepFailed(message, f"evaluate again: dropforge retry {attempt.spec.run} --from evaluate") from error
    if len({pair.id for pair in pairs}) != report.records:
        message = f"the report has {report.records} records and its file {len(pairs)}"
        raise StepFailed(message, f"evaluate again: dropforge retry {attempt.spec.run} --from evaluate")
    kept = [pair for pair, is_judged in zip(pairs, _judged_on(attempt, lines), strict=True) if is_judged]
    return heapq.nsmallest(attempt.config.judge.records, kept, key=lambda pair: pair.id)


def _judged_on(attempt: Attempt, lines: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return for each record whether the gate judges on it; other records are not sent to the judge."""
    drops = attempt.spec.champion.drops
    known = Known(None if drops is None else frozenset(drops))
    came_with = np.array([line["drop"] for line in lines], dtype=np.int64)
    pinned = np.array([line["pinned"] for line in lines], dtype=np.bool_)
    return [bool(flag) for flag in judged_on(attempt.config.gate.on, known, came_with, pinned)]


def _pair(line: Mapping[str, Any]) -> Pair:
    return Pair(
        id=line["id"],
        request=fold(line["instruction"], line["input"]),
        reference=next(iter(line["references"]), ""),
        candidate=line["candidate"]["text"].strip(),
        champion=line["champion"]["text"].strip(),
    )


def _write_judgements(path: Path, judged: Mapping[str, Judged]) -> None:
    lines = [
        {
            "id": record,
            "candidate_first": one.candidate_first,
            "champion_first": one.champion_first,
            "result": one.result,
        }
        for record, one in judged.items()
    ]
    durable.write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _say(session: JudgeSession, counts: Mapping[Outcome, int], records: int) -> None:
    """Write a summary to the log."""
    results = [f"{counts[name]} {name}" for name in ("win", "loss", "tie", "inconsistent", "failed")]
    replies = count(session.asked, "reply", "replies")
    words = [f"{count(records, 'record')}: {', '.join(results)}; {replies}, {session.found} from the log"]
    if session.unreadable:
        words.append(f"a reply without a winner: {session.unreadable[:SHOWN_REPLY]!r}")
    if session.gave_up:
        words.append(f"the endpoint was given up: {session.gave_up}")
        words.append("records without an answer count as failed, and the gate decides without them")
    sys.stderr.write("".join(f"judge: {line}\n" for line in words))
