"""
The judge step (optional): a remote language model compares both models' answers, each pair in both orders.

It can only block a promotion, and never fails a run: after repeated failures the step stops using the endpoint, and the
judgement has the number of records without an answer.
"""

import asyncio
import heapq
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import numpy as np

from pipeline import durable
from pipeline.artifacts import JUDGEMENTS_NAME, RECORDS_NAME, Evaluation, Judgement
from pipeline.contract import Attempt
from pipeline.decide.comparison import count_results
from pipeline.decide.slices import Known, judged_on
from pipeline.evaluate.prediction_cache import append_values, read_values, request_hash
from pipeline.judge.client import Chat, Choice, Endpoint, NoAnswerError, messages, prompt_sha256, read_choice, read_key
from pipeline.models.template import fold, transcript
from pipeline.words import count

#: In the attempt's folder `predictions`, which is kept until the run ends: replies may cost money.
REPLIES_NAME = "judge.replies.jsonl"
#: Records that are judged at once.
PARALLEL = 4
_STOP_SECONDS = 0.2
_SHOWN_REPLY = 80

Outcome = Literal["win", "loss", "tie", "inconsistent", "failed"]


#: A line of records.jsonl, a record with both models' answers.
Line = Mapping[str, Any]
#: The judge's winner of a pair with the candidate's answer as A, and as B; `None` without a readable reply.
Choices = tuple[Choice | None, Choice | None]
#: Only the same winner in both orders counts; other choices are inconsistent.
_OUTCOMES: Mapping[Choices, Outcome] = {("A", "B"): "win", ("B", "A"): "loss", ("tie", "tie"): "tie"}


def judge(attempt: Attempt) -> Judgement:
    """
    Return the judge's wins, losses and ties on the records with the lowest ids, among those that the gate judges on.

    At most `judge.records` are sent to the endpoint; equal answers are a tie without a request. The result of each
    record is written to a file in the attempt's `report/`, and a summary to standard error. Replies to an interrupted
    attempt are read from its log. Raises `Interrupted` if stopped, `StepFailed` without an evaluation; never because of
    the endpoint: records without two readable replies count as failed.
    """
    config = attempt.config.judge
    lines = _read_lines(attempt, attempt.load(Evaluation))
    folder = attempt.make_folder("report")
    session = _Session(attempt, lines)
    gave_up = ""
    try:
        asyncio.run(session.run())
    except NoAnswerError as error:
        gave_up = str(error)
    judged = [session.judged.get(line["id"], (None, None)) for line in lines]
    results: list[Outcome] = [
        "failed" if None in choices else _OUTCOMES.get(choices, "inconsistent") for choices in judged
    ]
    judgements = [
        {"id": line["id"], "candidate_first": choices[0], "champion_first": choices[1], "result": result}
        for line, choices, result in zip(lines, judged, results, strict=True)
    ]
    durable.write_jsonl(folder / JUDGEMENTS_NAME, judgements)
    _say(session, Counter(results), gave_up)
    return Judgement(folder=attempt.relative(folder), model=config.model, **count_results(results))


def _read_lines(attempt: Attempt, report: Evaluation) -> list[Line]:
    """Return the records that the gate judges on, those with the lowest ids, at most `judge.records`."""
    lines = list(durable.read_jsonl(attempt.path(report.folder) / RECORDS_NAME))
    came_with = np.array([line["drop"] for line in lines], dtype=np.int64)
    pinned = np.array([line["pinned"] for line in lines], dtype=np.bool_)
    # Other records are not sent to the judge.
    judged = judged_on(attempt.config.gate.on, Known(attempt.spec.champion.drops), came_with, pinned)
    kept = (line for line, is_judged in zip(lines, judged, strict=True) if is_judged)
    return heapq.nsmallest(attempt.config.judge.records, kept, key=lambda line: line["id"])


class _Session:
    """Judges all records, several at a time, each record's two questions in sequence."""

    def __init__(self, attempt: Attempt, lines: Sequence[Line]) -> None:
        """Read earlier attempts' replies, create the folder of this one's log, to which `run` adds those on `lines`."""
        self._attempt, self._lines = attempt, lines
        self._log = attempt.make_folder("predictions") / REPLIES_NAME
        self._known: dict[str, Choice | None] = read_values(attempt.earlier(f"predictions/{REPLIES_NAME}"))
        self._prompt = prompt_sha256(attempt.config.judge.model)
        self.judged: dict[str, Choices] = {}
        self.asked = self.read = 0
        """Replies received by this attempt, and read from the log."""
        self.unreadable = ""
        """An example of a reply without a winner."""

    async def run(self) -> None:
        """
        Judge all records; `judged` then has the choices by record id, `(None, None)` without an answer.

        Raises `Interrupted` if stopped, and `NoAnswerError` once no further question would get an answer.
        """
        waiting = iter(self._lines)
        config = self._attempt.config.judge
        async with aclosing(Endpoint(config, read_key(config.api_key_env))) as endpoint:
            tasks = {asyncio.create_task(self._serve(endpoint, waiting)) for _ in range(PARALLEL)}
            left = tasks
            try:
                while left:
                    done, left = await asyncio.wait(left, timeout=_STOP_SECONDS)
                    self._attempt.check_stop()
                    for task in done:
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, endpoint: Endpoint, waiting: Iterator[Line]) -> None:
        for line in waiting:
            try:
                self.judged[line["id"]] = await self._judge(endpoint, line)
            except NoAnswerError as error:
                # A single refused question, as by a content filter, is no reason to give up.
                if error.for_all:
                    raise
                self.judged[line["id"]] = (None, None)
                sys.stderr.write(f"judge: no answer for record {line['id'][:12]}: {error}\n")
            self._attempt.progress(len(self.judged), len(self._lines), phase="judge")

    async def _judge(self, endpoint: Endpoint, line: Line) -> Choices:
        candidate, champion = (line[role]["text"].strip() for role in ("candidate", "champion"))
        if candidate == champion:
            return "tie", "tie"
        content, turns = fold(line["instruction"], line["input"]), line.get("turns", ())
        texts = transcript([*turns, ("user", content)]) if turns else content, next(iter(line["references"]), "")
        first = await self._choice(endpoint, messages(*texts, candidate, champion))
        # Without a winner in this order the record fails, whatever the other order gives.
        return first, first and await self._choice(endpoint, messages(*texts, champion, candidate))

    async def _choice(self, endpoint: Endpoint, chat: Chat) -> Choice | None:
        asked = request_hash(self._prompt, chat)
        if asked in self._known:
            self.read += 1
            return self._known[asked]
        reply = await endpoint.ask(chat)
        choice = read_choice(reply)
        if choice is None:
            self.unreadable = self.unreadable or reply or "(empty, or no chat completion)"
        append_values(self._log, {asked: choice})
        self.asked += 1
        return choice


def _say(session: _Session, counts: Mapping[Outcome, int], gave_up: str) -> None:
    """Write a summary of the judgement to standard error."""
    results = [f"{counts[name]} {name}" for name in ("win", "loss", "tie", "inconsistent", "failed")]
    replies = count(session.asked, "reply", "replies")
    records = count(sum(counts.values()), "record")
    words = [f"{records}: {', '.join(results)}; {replies}, {session.read} from the log"]
    if session.unreadable:
        words.append(f"a reply without a winner: {session.unreadable[:_SHOWN_REPLY]!r}")
    if gave_up:
        words.append(f"the endpoint was given up: {gave_up}")
        words.append("records without an answer count as failed, and the gate decides without them")
    sys.stderr.write("".join(f"judge: {line}\n" for line in words))
