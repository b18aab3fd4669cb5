"""
General suites: questions outside the task, to detect forgetting.

`builtin` is a small built-in set, with free `questions`; a file is JSON Lines of such items or of Alpaca records. An
item with choices scores 1 if the right choice is the likeliest, else 0; a free question scores 1 if the answer contains
a right one; a record is answered and scored by token F1. Nothing of the training stack is imported.
"""

from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from pipeline.artifacts import Frozen
from pipeline.errors import CannotTrain
from pipeline.metrics.tokens import tokens
from pipeline.models.template import fold
from pipeline.records.records import Finding, read_records
from pipeline.records.strict_json import BadJson, parse
from pipeline.search_settings import first_problem

BUILTIN, QUESTIONS = "builtin", "questions"
#: The built-in suites.
_FILES = {name: Path(__file__).with_name(f"general_{name}.jsonl") for name in (BUILTIN, QUESTIONS)}
_MOST_LINE_BYTES = 1 << 24


class Item(Frozen):
    """One question of a suite, with choices or right answers."""

    id: str = ""
    """Its line's number if the file has none."""
    category: str = "general"
    question: str = Field(min_length=1)
    choices: tuple[str, ...] = ()
    answer: int | None = None
    """Index of the right choice."""
    answers: tuple[str, ...] = ()
    """Right answers to a free question."""
    words: int = Field(default=1, ge=0)
    """Fewest words of a right answer, which must contain one of `answers`; 0: token F1 is its score."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> "Item":
        choices = self.choices
        if bool(choices) == bool(self.answers):
            raise ValueError("it needs either choices and answer, or answers")
        if choices and (len(set(choices)) < max(2, len(choices)) or not all(map(str.strip, choices))):
            raise ValueError("choices: must be two or more, and not be empty or repeat")
        if choices and self.answer not in range(len(choices)):
            raise ValueError(f"answer: {self.answer} is not an index of the {len(choices)} choices, which start at 0")
        if self.words and not all(map(tokens, self.answers)):
            raise ValueError("answers: each must have a letter or digit")
        return self

    def score_choice(self, losses: Sequence[float]) -> float:
        """Return 1 if the right choice is the first with the lowest of `losses`, mean NLLs by choice; else 0."""
        return float(losses.index(min(losses)) == self.answer)

    def score_text(self, text: str) -> float:
        """Return 1 if `text` contains one of `answers`, compared by words, and has at least `words` words; else 0."""
        words = tokens(text)
        right = any(f" {' '.join(tokens(answer))} " in f" {' '.join(words)} " for answer in self.answers)
        return float(right and len(words) >= self.words)


@dataclass(frozen=True)
class Suite:
    """A named set of questions."""

    name: str
    """As in evaluate.general."""
    items: tuple[Item, ...]


def read_suites(names: Sequence[str], run: int) -> list[Suite]:
    """
    Return the suites named in a run's settings, without duplicates; `builtin` adds the free `questions`, too.

    Raises `CannotTrain` as `read_suite` does, with a hint to retry `run`.
    """
    parts = (part for name in names for part in ((BUILTIN, QUESTIONS) if name == BUILTIN else (name,)))
    try:
        return [read_suite(name) for name in dict.fromkeys(parts)]
    except CannotTrain as error:
        raise CannotTrain(error.message, f"{error.hint}; then: dropforge retry {run}") from error


def read_suite(name: str) -> Suite:
    """
    Return the suite `name`: `builtin`, `questions`, or the path of a file of items or Alpaca records in JSON Lines.

    It has at least one item. Raises `CannotTrain` if the file is missing, empty or, naming the line, invalid.
    """
    path = _FILES.get(name) or Path(name)
    if not path.is_file():
        message = f"there is no suite {name}"
        raise CannotTrain(message, f'evaluate.general takes "{BUILTIN}", "{QUESTIONS}" or the path of a file')
    numbered = tuple(_items(path))
    if not numbered:
        raise CannotTrain(f"the suite {path} is empty", "write one item per line, or remove it from evaluate.general")
    seen: dict[str, int] = {}
    for number, item in numbered:
        if seen.setdefault(item.id, number) != number:
            raise _wrong(path, number, f"id: {item.id!r} is already the id of line {seen[item.id]}")
    return Suite(name, tuple(item for _, item in numbered))


def _items(path: Path) -> Iterator[tuple[int, Item]]:
    """
    Yield a file's items with their line numbers; Alpaca records with their positions, from 1.

    Raises `CannotTrain`, naming the line, if one is invalid or a record has earlier turns.
    """
    lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    first = next((line for line in lines if line.strip()), b"")
    if b'"choices"' in first or b'"question"' in first:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _question(path, number, line)
        return
    for number, record in enumerate(read_records(path, _MOST_LINE_BYTES), 1):
        if isinstance(record, Finding):
            raise _wrong(path, record.line or number, record.message)
        if record.turns:
            raise _wrong(path, record.line, "a question of a suite has no turns before it")
        content = fold(record.instruction, record.input)
        yield number, Item(id=str(number), question=content, answers=(record.output,), words=0)


def _question(path: Path, number: int, line: bytes) -> Item:
    try:
        item = Item.model_validate(parse(line))
    except BadJson as error:
        raise _wrong(path, number, error.message) from error
    except ValidationError as error:
        field, problem, _ = first_problem(error)
        raise _wrong(path, number, f"{'.'.join(field)}: {problem}" if field else problem) from error
    return item if item.id else item.model_copy(update={"id": str(number)})


def _wrong(path: Path, line: int, problem: str) -> CannotTrain:
    hint = (
        'a line is {"id", "category", "question", "choices": [...], "answer": index of the right one}, or '
        '{"question", "answers": [...]}, or a record'
    )
    return CannotTrain(f"suite {path}, line {line}: {problem}", hint)
