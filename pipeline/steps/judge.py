"""
Optional: a language model somewhere else compares both models' answers, each pair in both orders.

It can only stand against a promotion. So it is never a reason to lose a run either: an endpoint that is down, slow or
talks nonsense is given up after a while, and the judgement says how many records it has no answer for.
"""

import asyncio
import heapq
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import durable
from pipeline.artifacts import Judgement, Report
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.evaluation.batch_log import BatchLog, batch_id
from pipeline.evaluation.judge_client import Endpoint, NoAnswerError, read_key
from pipeline.evaluation.judge_prompt import Chat, Choice, Question, messages, prompt_sha256, read_choice
from pipeline.gate.comparison import JUDGEMENTS_NAME, count_results
from pipeline.gate.slices import Known, judged_on
from pipeline.prompt import fold

#: In the attempt's folder `predictions`, which no clearing up touches while the run goes on: replies may cost money.
REPLIES_NAME = "judge.replies.jsonl"
PARALLEL = 4
#: Records without an answer in a row after which the endpoint is given up.
STRIKES = 8
_STOP_SECONDS = 0.2
_SHOWN_REPLY = 80

Outcome = Literal["win", "loss", "tie", "inconsistent", "failed"]


@dataclass(frozen=True)
class _Pair:
    """One held-out record with both models' answers."""

    id: str
    request: str
    reference: str
    candidate: str
    champion: str

    def question(self, *, candidate_first: bool) -> Question:
        answers = (self.candidate, self.champion) if candidate_first else (self.champion, self.candidate)
        return Question(self.request, self.reference, *answers)


@dataclass(frozen=True)
class _Judged:
    """The winner in each order as the judge named it; `None` where it was not asked or could not be read."""

    candidate_first: Choice | None = None
    champion_first: Choice | None = None

    @property
    def result(self) -> Outcome:
        """What both together say: only the same answer in both orders counts."""
        match (self.candidate_first, self.champion_first):
            case (None, _) | (_, None):
                return "failed"
            case ("A", "B"):
                return "win"
            case ("B", "A"):
                return "loss"
            case ("tie", "tie"):
                return "tie"
            case _:
                return "inconsistent"


def judge(attempt: Attempt) -> Judgement:
    """
    Return what the endpoint of `judge.url` says of the records with the lowest ids, of those that the gate judges on.

    One line a record is kept. Equal answers are a tie without asking. Replies that an interrupted attempt had are taken
    from its log. Raises `StepFailed` if the report's records cannot be read, `Interrupted` if asked to stop; never for
    the endpoint's sake.
    """
    report = attempt.load(Report)
    config = attempt.config.judge
    pairs = _read_pairs(attempt, report)[: config.records]
    folder = attempt.make_folder("report")
    log = BatchLog(attempt.make_folder("predictions") / REPLIES_NAME, _earlier_logs(attempt))
    sitting = _Sitting(attempt, pairs, log)
    try:
        asyncio.run(sitting.hold())
    except NoAnswerError as error:
        sitting.gave_up = error.words
    finally:
        log.close()
    judged = {pair.id: sitting.judged.get(pair.id, _Judged()) for pair in pairs}
    _write_judgements(folder / JUDGEMENTS_NAME, judged)
    counts = Counter(one.result for one in judged.values())
    _say(sitting, counts, len(pairs))
    return Judgement(
        folder=attempt.relative(folder),
        model=config.model,
        prompt_sha256=sitting.prompt,
        **count_results([one.result for one in judged.values()]),
    )


def _read_pairs(attempt: Attempt, report: Report) -> list[_Pair]:
    """Return the report's records that the gate judges on, those with the lowest ids first."""
    lines = list(durable.read_jsonl(attempt.path(report.folder) / "records.jsonl"))
    try:
        pairs = [_pair(line) for line in lines]
    except (KeyError, TypeError) as error:
        message = f"a record of the report lacks {error}"
        raise StepFailed(message, f"evaluate again: dropforge retry {attempt.spec.run} --from evaluate") from error
    if len({pair.id for pair in pairs}) != report.records:
        message = f"the report speaks of {report.records} records and its file holds {len(pairs)}"
        raise StepFailed(message, f"evaluate again: dropforge retry {attempt.spec.run} --from evaluate")
    kept = [pair for pair, is_judged in zip(pairs, _judged_on(attempt, lines), strict=True) if is_judged]
    return heapq.nsmallest(attempt.config.judge.records, kept, key=lambda pair: pair.id)


def _judged_on(attempt: Attempt, lines: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Say of each record whether the gate judges on it: to ask about another one would cost and not count."""
    drops = attempt.spec.champion.drops
    known = Known(None if drops is None else frozenset(drops))
    came_with = np.array([line.get("drop", 0) for line in lines], dtype=np.int64)
    pinned = np.array([line.get("pinned", False) for line in lines], dtype=np.bool_)
    return [bool(flag) for flag in judged_on(attempt.config.gate.on, known, came_with, pinned)]


def _pair(line: Mapping[str, Any]) -> _Pair:
    return _Pair(
        id=line["id"],
        request=fold(line["instruction"], line["input"]),
        reference=next(iter(line["references"]), ""),
        candidate=line["candidate"]["text"].strip(),
        champion=line["champion"]["text"].strip(),
    )


def _earlier_logs(attempt: Attempt) -> Iterator[Path]:
    """Yield the replies that the run's earlier attempts left, in their order."""
    for number in range(1, attempt.spec.attempt):
        path = attempt.folder.with_name(f"{attempt.spec.step}-{number}") / "predictions" / REPLIES_NAME
        if path.is_file():
            yield path


class _Sitting:
    """Asks what is not known yet, some records at a time, each record's two questions one after the other."""

    def __init__(self, attempt: Attempt, pairs: Sequence[_Pair], log: BatchLog) -> None:
        self._attempt, self._pairs, self._log = attempt, pairs, log
        self.prompt = prompt_sha256(attempt.config.judge.model)
        self.judged: dict[str, _Judged] = {}
        self.asked = self.found = 0
        """Questions that were answered now, and by an earlier attempt."""
        self.gave_up = ""
        """Why the rest was not asked."""
        self.unreadable = ""
        """A reply that named no winner, as an example."""
        self._in_a_row = 0

    async def hold(self) -> None:
        """Judge all pairs. Raises `Interrupted`, and `NoAnswerError` when the endpoint is given up."""
        self._take_known()
        waiting = iter([pair for pair in self._pairs if pair.id not in self.judged])
        config = self._attempt.config.judge
        async with Endpoint(config, read_key(config.api_key_env)) as endpoint:
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

    def _take_known(self) -> None:
        """Judge the pairs that need no question: equal answers, and those of which every reply is in the log."""
        for pair in self._pairs:
            if pair.candidate == pair.champion:
                self.judged[pair.id] = _Judged("tie", "tie")
                continue
            first, second = (self._find(messages(pair.question(candidate_first=way))) for way in (True, False))
            if first == [None]:
                self.judged[pair.id] = _Judged()
                self.found += 1
            elif first and second:
                self.judged[pair.id] = _Judged(*first, *second)
                self.found += 2
        self._say_progress()

    async def _serve(self, endpoint: Endpoint, waiting: Iterator[_Pair]) -> None:
        for pair in waiting:
            try:
                self.judged[pair.id] = await self._judge(endpoint, pair)
            except NoAnswerError as error:
                self._in_a_row += 1
                # What is forbidden for one question alone, as by a filter of contents, is no reason to give up.
                if (error.for_all and not self.asked) or self._in_a_row >= STRIKES:
                    raise
                self.judged[pair.id] = _Judged()
                sys.stderr.write(f"judge: no answer for record {pair.id[:12]}: {error.words}\n")
            self._say_progress()

    async def _judge(self, endpoint: Endpoint, pair: _Pair) -> _Judged:
        first = await self._choice(endpoint, pair.question(candidate_first=True))
        if first is None:
            # Nothing that the other order says could make it count.
            return _Judged()
        return _Judged(first, await self._choice(endpoint, pair.question(candidate_first=False)))

    async def _choice(self, endpoint: Endpoint, question: Question) -> Choice | None:
        chat = messages(question)
        known = self._find(chat)
        if known:
            self.found += 1
            return known[0]
        reply = await endpoint.ask(chat)
        self._in_a_row = 0
        choice = read_choice(reply)
        if choice is None:
            self.unreadable = self.unreadable or reply or "(empty, or no chat completion)"
        self._log.add(batch_id(self.prompt, chat), [choice])
        self.asked += 1
        return choice

    def _find(self, chat: Chat) -> list[Choice | None] | None:
        """Return, as a list of one, what an earlier attempt was told; `None` if it did not ask."""
        return self._log.find(batch_id(self.prompt, chat), 1)

    def _say_progress(self) -> None:
        self._attempt.progress(len(self.judged), len(self._pairs), phase="judge")


def _write_judgements(path: Path, judged: Mapping[str, _Judged]) -> None:
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


def _say(sitting: _Sitting, counts: Mapping[Outcome, int], records: int) -> None:
    """Write to the log what came of it."""
    said = [f"{counts[name]} {name}" for name in ("win", "loss", "tie", "inconsistent", "failed")]
    words = [f"{records} records: {', '.join(said)}; {sitting.asked} replies, {sitting.found} from before"]
    if sitting.unreadable:
        words.append(f"a reply that named no winner: {sitting.unreadable[:_SHOWN_REPLY]!r}")
    if sitting.gave_up:
        words.append(f"the endpoint was given up: {sitting.gave_up}")
        words.append("records without an answer count as failed, and the gate decides without them")
    sys.stderr.write("".join(f"judge: {line}\n" for line in words))
