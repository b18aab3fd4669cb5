"""Ask the judge about each pair, in both orders, and keep every reply."""

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


#: Records without an answer in a row after which the endpoint is given up.
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
        """Return what the judge is asked in one order."""
        answers = (self.candidate, self.champion) if candidate_first else (self.champion, self.candidate)
        return Question(self.request, self.reference, *answers)


@dataclass(frozen=True)
class Judged:
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


class JudgeSession:
    """Asks what is not known yet, some records at a time, each record's two questions one after the other."""

    def __init__(self, attempt: Attempt, pairs: Sequence[Pair], log: BatchLog) -> None:
        """Ask about `pairs`; every reply is kept in `log`."""
        self._attempt, self._pairs, self._log = attempt, pairs, log
        self.prompt = prompt_sha256(attempt.config.judge.model)
        self.judged: dict[str, Judged] = {}
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
                # What is forbidden for one question alone, as by a filter of contents, is no reason to give up.
                if (error.for_all and not self.asked) or self._in_a_row >= STRIKES:
                    raise
                self.judged[pair.id] = Judged()
                sys.stderr.write(f"judge: no answer for record {pair.id[:12]}: {error.words}\n")
            self._say_progress()

    async def _judge(self, endpoint: Endpoint, pair: Pair) -> Judged:
        first = await self._choice(endpoint, pair.question(candidate_first=True))
        if first is None:
            # Nothing that the other order says could make it count.
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
        """Return, as a list of one, what an earlier attempt was told; `None` if it did not ask."""
        return self._log.find(batch_id(self.prompt, chat), 1)

    def _say_progress(self) -> None:
        self._attempt.progress(len(self.judged), len(self._pairs), phase="judge")
