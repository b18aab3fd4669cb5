"""
General suites: questions outside the task, to detect forgetting.

`builtin` is a small built-in set, with free `questions`; a file is JSON Lines of such items or of Alpaca records;
`lm-eval:TASK` is a task of the package lm-eval. An item with choices scores 1 if the right choice is the likeliest,
else 0; a free question scores 1 if the answer contains a right one; a record is answered and scored by token F1.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pipeline.errors import CannotTrain
from pipeline.evaluate.lm_eval import check_task
from pipeline.evaluate.suite_items import BUILTIN, HARNESS, QUESTIONS, Item, read_items

#: Part of every suite's hash: another scoring method gives other scores.
_SCORING = "choices by mean likelihood a token, records by token F1, questions by words: 2"


@dataclass(frozen=True)
class Suite:
    """A named set of questions, or an lm-eval task."""

    name: str
    """As in evaluate.general."""
    digest: str
    items: tuple[Item, ...] = ()
    task: str = ""
    """The lm-eval task's name; lm-eval keeps its items."""


def read_suites(names: Sequence[str], run: int) -> list[Suite]:
    """Return the suites named in a run's settings, without duplicates. Raises `CannotTrain` as `read_suite` does."""
    parts = (part for name in names for part in ((BUILTIN, QUESTIONS) if name == BUILTIN else (name,)))
    try:
        return [read_suite(name) for name in dict.fromkeys(parts)]
    except CannotTrain as error:
        raise CannotTrain(error.message, f"{error.hint}; then: dropforge retry {run}") from error


def read_suite(name: str) -> Suite:
    """
    Return the suite with this name in evaluate.general.

    Raises `CannotTrain`, naming line and field, if its file is missing or invalid, or if lm-eval cannot load the task.
    """
    if name.startswith(HARNESS):
        task = name.removeprefix(HARNESS)
        return Suite(name, _digest(check_task(task)), task=task)
    items = read_items(name)
    return Suite(name, _digest(*(json.dumps(asdict(item), sort_keys=True) for item in items)), items)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps([_SCORING, *parts]).encode()).hexdigest()
