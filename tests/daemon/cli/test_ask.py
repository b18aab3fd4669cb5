"""`ask`: a real, tiny champion answers in a process of its own, as it does in an evaluation."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.generation import Decoding, load_template, open_model
from pipeline.models.greedy_decoding import answers
from pipeline.models.template import conversation, fold, single_turn
from tests.daemon.conftest import MODEL_ID

Command = Callable[..., Any]
DECODING = Decoding(max_new_tokens=12, repetition_penalty=1.1, batch_size=1)


@pytest.fixture
def serving(lived_in: Any, tiny_llama: Path) -> Any:
    """The workspace `lived_in` with real models: base and champion are the same tiny one."""
    shutil.copytree(tiny_llama, lived_in.folder / "base", dirs_exist_ok=True)
    shutil.copytree(tiny_llama, lived_in.settings.state_folder / "models" / MODEL_ID, dirs_exist_ok=True)
    (lived_in.folder / "dropforge.toml").write_text(
        'device = "cpu"\n[evaluate]\nmax_new_tokens = 12\nrepetition_penalty = 1.1\n[tracks.support]\n'
    )
    return lived_in


def evaluated(folder: Path, prompt: str, more: str = "") -> str:
    """Return the answer that an evaluation gets."""
    asked = open_model(folder, load_template(folder, "auto"), "cpu")
    return answers(asked, [asked.template.prompt(single_turn(fold(prompt, more)))], DECODING)[0].text


def test_what_is_told_while_it_is_made_is_the_evaluations_answer(tiny_llama: Path) -> None:
    asked = open_model(tiny_llama, load_template(tiny_llama, "auto"), "cpu")
    prompt = asked.template.prompt(single_turn("say it"))
    told: list[str] = []
    (found,) = answers(asked, [prompt], DECODING, lambda _, tokens: told.append(asked.template.read(tokens[0])))
    assert len(told) == found.tokens
    assert told[-1] == found.text


@pytest.mark.usefixtures("serving")
def test_the_champion_answers_as_evaluated(tiny_llama: Path, dropforge: Command) -> None:
    ended = dropforge("ask", "say it", "--input", "to me")
    assert (ended.code, ended.out) == (0, f"{evaluated(tiny_llama, 'say it', 'to me')}\n"), ended.err


@pytest.mark.usefixtures("serving")
def test_the_champion_answers_after_earlier_turns(tiny_llama: Path, dropforge: Command, tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "1")]
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    asked = open_model(tiny_llama, load_template(tiny_llama, "auto"), "cpu")
    (expected,) = answers(asked, [asked.template.prompt(conversation(turns, "say it"))], DECODING)
    assert dropforge("ask", "say it", "--messages", file, "--json").json["text"] == expected.text
    for content in ('[{"role": "user", "content": "One?"}]', "{}", "[1", '[{"role": "tool", "content": "x"}]'):
        file.write_text(content)
        ended = dropforge("ask", "say it", "--messages", file)
        assert (ended.code, "Traceback" in ended.err, "earlier.json" in ended.err) == (1, False, True)


def test_a_model_that_cannot_be_loaded_is_said(new_workspace: Any, dropforge: Command) -> None:
    new_workspace()
    assert dropforge("ask", "say it", "--track", "support").err.startswith("error: track support has no champion yet")
    ended = dropforge("ask", "say it")
    assert (ended.code, "error: " in ended.err, "hint: " in ended.err) == (1, True, True)
    assert "Traceback" not in ended.err


def test_a_request_that_is_none_is_said_in_one_line_of_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.models.ask"], input="{}", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert set(json.loads(done.stdout)) == {"error", "hint"}


def test_an_answers_terminal_codes_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    from daemon.cli.handover import _print_part  # noqa: PLC0415

    _print_part({"text": "one\ntwo\x1b[2J\u202e"})
    _print_part({"tokens": 3, "ended": False})
    out, err = capsys.readouterr()
    assert out == "one\ntwo\\x1b[2J\\u202e\n"
    assert "cut after 3 tokens" in err
