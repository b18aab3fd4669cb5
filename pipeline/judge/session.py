"""Let the judge compare each pair of answers in both orders, and log every reply."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.contract import Attempt
from pipeline.evaluate.batch_log import BatchLog, batch_id
from pipeline.judge.client import Endpoint, NoAnswerError, read_key
from pipeline.judge.prompt import Chat, Choice, Question, messages, prompt_sha256, read_choice

PARALLEL = 4


#: Consecutive records without an answer after which the session ends.
STRIKES = 8


_STOP_SECONDS = 0.2


SHOWN_REPLY = 80


Outcome = Literal["win", "loss", "tie", "inconsistent", "failed"]


@dataclass(frozen=True)
class Pair:
    """One held-out record with both models' answers."""

    id: str
    request: str
    reference: str
    candidate: str
    champion: str

    def question(self, *, candidate_first: bool) -> Question:
        """Return the judge's question in one order."""
        answers = (self.candidate, self.champion) if candidate_first else (self.champion, self.candidate)
        return Question(self.request, self.reference, *answers)


@dataclass(frozen=True)
class Judged:
    """The judge's winner in each order; `None` if not asked or not readable."""

    candidate_first: Choice | None = None
    champion_first: Choice | None = None

    @property
    def result(self) -> Outcome:
        """The outcome of both orders: only the same winner in both counts."""
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


class JudgeSession:
    """Judges all pairs that are not in the log, several records at a time, each record's two questions in sequence."""

    def __init__(self, attempt: Attempt, pairs: Sequence[Pair], log: BatchLog) -> None:
        """Judge `pairs`; every reply is appended to `log`."""
        self._attempt, self._pairs, self._log = attempt, pairs, log
        self.prompt = prompt_sha256(attempt.config.judge.model)
        self.judged: dict[str, Judged] = {}
        self.asked = self.found = 0
        """Replies received by this attempt, and read from the log."""
        self.gave_up = ""
        """Why the session ended early; empty if it did not."""
        self.unreadable = ""
        """An example of a reply without a winner."""
        self._in_a_row = 0

    async def hold(self) -> None:
        """Judge all pairs. Raises `Interrupted`, and `NoAnswerError` if the endpoint does not answer."""
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
        """Judge pairs that need no request: equal answers, and those whose replies are in the log."""
        for pair in self._pairs:
            if pair.candidate == pair.champion:
                self.judged[pair.id] = Judged("tie", "tie")
                continue
            first, second = (self._find(messages(pair.question(candidate_first=way))) for way in (True, False))
            if first == [None]:
                self.judged[pair.id] = Judged()
                self.found += 1
            elif first and second:
                self.judged[pair.id] = Judged(*first, *second)
                self.found += 2
        self._say_progress()

    async def _serve(self, endpoint: Endpoint, waiting: Iterator[Pair]) -> None:
        for pair in waiting:
            try:
                self.judged[pair.id] = await self._judge(endpoint, pair)
            except NoAnswerError as error:
                self._in_a_row += 1
                # A single refused question, as by a content filter, is no reason to give up.
                if (error.for_all and not self.asked) or self._in_a_row >= STRIKES:
                    raise
                self.judged[pair.id] = Judged()
                sys.stderr.write(f"judge: no answer for record {pair.id[:12]}: {error.words}\n")
            self._say_progress()

    async def _judge(self, endpoint: Endpoint, pair: Pair) -> Judged:
        first = await self._choice(endpoint, pair.question(candidate_first=True))
        if first is None:
            # Without a winner in this order the other cannot make it count.
            return Judged()
        return Judged(first, await self._choice(endpoint, pair.question(candidate_first=False)))

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
        """Return the logged choice as a list of one; `None` if it is not in the log."""
        return self._log.find(batch_id(self.prompt, chat), 1)

    def _say_progress(self) -> None:
        self._attempt.progress(len(self.judged), len(self._pairs), phase="judge")
