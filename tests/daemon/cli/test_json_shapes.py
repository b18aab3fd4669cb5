"""
What every reader gives with `--json`: keys, their order and kinds, as json_shapes.json beside this file has them.

A script that reads it breaks where a key goes or changes its kind: then `SCHEMA` of daemon/cli/output.py is raised.
After a change that is meant: UPDATE_SHAPES=1 pytest tests/daemon/cli/test_json_shapes.py
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from daemon.champions import smoke_test
from daemon.cli import app
from daemon.messages import outbox
from daemon.queue import order
from daemon.settings.load import load
from daemon.state.events import Word
from daemon.state.states import AttemptState
from tests.daemon.cli.test_report import end
from tests.daemon.conftest import lines
from tests.model_folder import write_model

SHAPES = Path(__file__).with_name("json_shapes.json")
Command = Callable[..., Any]
#: Free in their keys, or with a schema of their own.
OPAQUE = {"config", "report", "drops_by_track"}
#: Each question with the exit code of its answer.
QUESTIONS: dict[str, tuple[tuple[str, ...], int]] = {
    "status": (("status",), 69),
    "attention": (("attention",), 0),
    "runs": (("runs",), 0),
    "show": (("show", "1"), 0),
    "show of a run that runs": (("show", "5"), 0),
    "report": (("report", "1"), 0),
    "review": (("review", "1"), 0),
    "champion": (("champion",), 0),
    "history": (("history",), 0),
    "drops": (("drops",), 0),
    "check": (("check", "bad.jsonl"), 65),
    "doctor": (("doctor",), 0),
    "messages": (("messages",), 0),
    "gc": (("gc", "--dry-run"), 0),
    "backup": (("backup", "copy"), 0),
    "config show": (("config", "show"), 0),
    "config check": (("config", "check"), 0),
    "wait": (("wait", "2"), 10),
    "ask": (("ask", "say it"), 0),
    "an error": (("show", "99"), 1),
    "restore": (("restore", "copy", "--without-models"), 0),
}


def shape(value: Any, key: str = "") -> Any:
    """Return keys and kinds of a JSON value; a list has those of all that is in it."""
    if isinstance(value, dict):
        return "object" if key in OPAQUE else {name: shape(one, name) for name, one in value.items()}
    if isinstance(value, list):
        kinds: Any = None
        for one in value:
            kinds = shape(one) if kinds is None else joined(kinds, shape(one))
        return [] if kinds is None else [kinds]
    return "null" if value is None else {"bool": "boolean", "str": "string"}.get(type(value).__name__, "number")


def joined(one: Any, other: Any) -> Any:
    """Return what both are: of objects all keys, of kinds each; what may be an object or null is told as the object."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        return {name: joined(one.get(name, "missing"), other.get(name, "missing")) for name in names}
    if isinstance(one, list) and isinstance(other, list):
        return one if one == other or not other else other if not one else [joined(one[0], other[0])]
    if one == other:
        return one
    if isinstance(one, dict) and other == "null":
        return one
    if isinstance(other, dict) and one == "null":
        return other
    kinds = {*words(one), *words(other)}
    return " or ".join(sorted(kinds))


def words(kind: Any) -> list[str]:
    return kind.split(" or ") if isinstance(kind, str) else ["object" if isinstance(kind, dict) else "list"]


@pytest.fixture
def full(new_workspace: Callable[[], Any], made_reports: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A workspace with something of everything."""
    made = new_workspace()
    path = made.folder / "dropforge.toml"
    write_model(made.folder / "trainable", b"w")
    path.write_text(f'base_model = "trainable"\n{path.read_text()}[messages]\nurls = ["json://127.0.0.1:1/"]\n')
    outbox.open_outbox(made.engine, load(path, {}), made.now)
    made.take("exam.jsonl", lines("q"), "heldout")
    end(made, made_reports, "promoted")
    end(made, made_reports, "guard_failed")
    made.take("second.jsonl", lines("b"))
    third = made.claim()
    made.attempt(third, "train")
    made.promote(third)
    made.take("third.jsonl", lines("c"))
    fourth = made.claim()
    made.attempt(fourth, "train", AttemptState.FAILED)
    made.fail(fourth)
    made.take("again.jsonl", lines("c"))
    made.take("bad.jsonl", '{"instruction": "x"}\n')
    made.take("fourth.jsonl", lines("d"))
    made.attempt(made.claim(), "train", None)
    made.take("case.jsonl", lines("e"), track="support")
    order.pause(made.engine, "support", Word("the card is lent out", made.tick(), "ada"))
    outbox.collect(made.engine, load(path, {}), made.tick())
    (made.folder / "bad.jsonl").write_text('{"instruction": "x"}\n')

    def answer(_request: Any, _device: str) -> Iterator[dict[str, Any]]:
        yield from ({"text": "it"}, {"tokens": 2, "ended": True})

    monkeypatch.setattr(smoke_test, "ask", answer)
    return made


@pytest.mark.usefixtures("full")
def test_every_reader_has_its_keys_in_their_order_and_of_their_kinds(dropforge: Command) -> None:
    found = {}
    for name, (arguments, code) in QUESTIONS.items():
        ended = dropforge(*arguments, "--json")
        assert ended.code == code, (name, ended.out, ended.err)
        found[name] = shape(ended.json)
    text = json.dumps(found, indent=1) + "\n"
    if os.environ.get("UPDATE_SHAPES") == "1":
        SHAPES.write_text(text)
    assert text == SHAPES.read_text()


def test_every_command_with_json_is_asked_here() -> None:
    def readers(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
        if any("--json" in one.opts for one in command.params):
            yield " ".join(path)
        for name, below in getattr(command, "commands", {}).items():
            yield from readers(below, (*path, name))

    root: Any = get_command(app)
    for name in root.list_commands(None):
        root.get_command(None, name)
    assert set(readers(root)) <= set(QUESTIONS)


def test_a_key_that_goes_or_changes_its_kind_would_be_seen() -> None:
    assert shape({"a": [{"b": 1}, {"b": None, "c": "x"}]}) == {"a": [{"b": "null or number", "c": "missing or string"}]}
    assert list(shape({"b": 1, "a": True})) == ["b", "a"]
