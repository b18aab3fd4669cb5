"""Two tasks that a small model can learn, as rows: one is the track's own, the other what it should not forget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tests.demo_data import INSTRUCTION, TEAMS, generate_messages

Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """A question about texts, each with the word that answers it; `texts` never ends, and none comes twice."""

    instruction: str
    answers: Sequence[str]
    texts: Iterator[tuple[str, str]] = field(repr=False)

    def rows(self, count: int, answers: int = 99) -> list[Row]:
        """Return the next `count` records that one of the first `answers` answers is right for, so answered."""
        wanted = (pair for pair in self.texts if pair[1] in self.answers[:answers])
        return [
            {"instruction": self.instruction, "input": text, "output": answer} for text, answer in islice(wanted, count)
        ]

    def wrong(self, count: int, answers: int = 99) -> list[Row]:
        """Return such records with the same wrong answer to the same question each time: the next one of the list."""
        next_one = dict(zip(self.answers, [*self.answers[1:], self.answers[0]], strict=True))
        return [{**row, "output": next_one[row["output"]]} for row in self.rows(count, answers)]


def desk_task(seed: int) -> Task:
    """Return the demo's task: which team answers a message."""
    return Task(INSTRUCTION, tuple(TEAMS.values()), ((one.text, TEAMS[one.topic]) for one in generate_messages(seed)))


def topic_task(seed: int) -> Task:
    """Return another question about messages of the same kind, with answers of its own."""
    shelves = dict(zip(TEAMS, ("shelf-red", "shelf-blue", "shelf-green", "shelf-gold", "shelf-grey"), strict=True))
    texts = ((one.text, shelves[one.topic]) for one in generate_messages(seed))
    return Task("Name the shelf where this message is filed.", tuple(shelves.values()), texts)
