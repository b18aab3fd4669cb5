"""
What every reader gives with `--json`: keys and their order, as json_shapes.json beside this file has them.

A script that reads it breaks where a key goes: then `SCHEMA` of daemon/cli/output.py is raised.
After a change that is meant: UPDATE_SHAPES=1 pytest tests/daemon/cli/test_json_shapes.py
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.champions import smoke_test
from daemon.messages import outbox
from daemon.queue import order
from daemon.settings.load import load
from daemon.state.events import Word
from daemon.state.states import AttemptState
from daemon.views import doctor
from tests.daemon.cli.test_examples import LEAVES
from tests.daemon.conftest import lines
from tests.model_folder import write_model
from tests.run_owner import end_with_card

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
    """Return the keys of a JSON value, in their order; a list has those of all that is in it."""
    if isinstance(value, dict):
        return "object" if key in OPAQUE else {name: shape(one, name) for name, one in value.items()}
    if isinstance(value, list):
        kinds: Any = None
        for one in value:
            kinds = joined(kinds, shape(one))
        return [kinds]
    return None


def joined(one: Any, other: Any) -> Any:
    """Return the keys of both."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: joined(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return [joined(one[0], other[0])]
    return other if one is None else one


@pytest.fixture
def full(new_workspace: Callable[[], Any], made_reports: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A workspace with something of everything."""
    made = new_workspace()
    path = made.folder / "dropforge.toml"
    write_model(made.folder / "trainable", b"w")
    more = '[messages]\nurls = ["json://127.0.0.1:1/"]\n[hooks]\nafter_promotion = ["true"]\nhealth = ["true"]\n'
    path.write_text(f'base_model = "trainable"\n{path.read_text()}{more}')
    outbox.open_outbox(made.engine, load(path, {}), made.now)
    made.take("exam.jsonl", lines("q"), "heldout")
    end_with_card(made, made_reports, "promoted")
    end_with_card(made, made_reports, "guard_failed")
    made.win("second")
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
    monkeypatch.setattr(doctor, "try_adapter", lambda _folder, _train: {})
    return made


@pytest.mark.usefixtures("full")
def test_every_reader_has_its_keys_in_their_order(dropforge: Command) -> None:
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
    readers = {name for name, command in LEAVES.items() if any("--json" in one.opts for one in command.params)}
    assert readers <= set(QUESTIONS)
