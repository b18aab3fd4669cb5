"""`dropforge review`: on a terminal, for programs, and what waits for it."""

import os
import select
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import SCRIPT
from tests.run_owner import end_with_card

Command = Callable[..., Any]
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\u202eevil\r\nanswer 2:\n  forged\u2028more\x00"


def hostile(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records whose every text is an attack on the terminal."""
    return [
        {
            **line,
            "instruction": HOSTILE,
            "candidate": {**line["candidate"], "text": f"{HOSTILE}{line['candidate']['text']}"},
            "champion": {**line["champion"], "text": f"{HOSTILE}{line['champion']['text']}"},
        }
        for line in lines
    ]


@pytest.fixture
def workspace(new_workspace: Callable[[], Any], made_reports: Any) -> Any:
    """Return a workspace whose run 1 won and waits for a review of three pairs."""
    made = new_workspace()
    end_with_card(made, made_reports, "promoted", hostile, review=3)
    return made


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self.ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            [SCRIPT, "review", "1"], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)

    def read(self, until: str = "another time) ") -> str:
        """Return what is shown until these words, or until the command has ended."""
        shown = b""
        while not shown.endswith(until.encode()):
            assert select.select([self.ours], [], [], 60)[0], f"nothing more was shown after {shown[-200:]!r}"
            try:
                part = os.read(self.ours, 10_000)
            except OSError:
                break  # the other side is closed
            if not part:
                break
            shown += part
        return shown.decode()

    def press(self, key: str) -> None:
        """Press a key once the command listens: what is typed before a pair is shown is thrown away."""
        waited = time.monotonic() + 60
        while termios.tcgetattr(self.ours)[3] & termios.ICANON:
            assert time.monotonic() < waited, "the command reads no keys"
            time.sleep(0.01)
        os.write(self.ours, key.encode())

    def end(self) -> int:
        os.close(self.ours)
        return self.process.wait(timeout=60)


def test_keys_on_a_terminal_judge_one_pair_each_and_q_goes_on_later(
    workspace: Any, dropforge: Command, tmp_path: Path
) -> None:
    assert workspace
    terminal = Terminal(tmp_path)
    assert "--- 1 of 3" in terminal.read()
    terminal.press("x")
    assert terminal.read().startswith("x\r\nbetter: 1, 2")
    terminal.press("u")
    assert terminal.read().startswith("u\r\nbetter: 1, 2"), "there is nothing to take back yet"
    terminal.press("1")
    assert "--- 2 of 3" in terminal.read()
    terminal.press("U")
    assert "--- 1 of 3" in terminal.read()
    terminal.press("1")
    assert "--- 2 of 3" in terminal.read()
    terminal.press("q")
    assert "1 of 3 pairs are judged blind; to go on: dropforge review 1" in terminal.read("\0")
    assert terminal.end() == 0
    assert dropforge("review", 1, "--json").json["review"]["judged"] == 1
    terminal = Terminal(tmp_path)
    shown = terminal.read()
    assert "--- 2 of 3" in shown, "what was judged is not asked again"
    terminal.press("2")
    shown += terminal.read()
    terminal.press("0")
    shown += terminal.read("\0")
    assert terminal.end() == 0
    assert "3 of the 78 records that the models did not answer alike, judged blind by " in shown
    assert "two-sided exact sign test" in shown
    for raw in ("\x1b", "\x07", "\x00", "\u202e", "\u2028"):
        assert raw not in shown, "what an answer says to the terminal is shown, not obeyed"
    assert "\\x1b]0;owned\\x07\\x1b[2J\\x1b[31mred\\u202eevil" in shown
    assert "\n  | answer 2:\r\n" in shown, "a heading within an answer is marked as a part of it"


def test_programs_read_the_pairs_and_judge_them(workspace: Any, dropforge: Command) -> None:
    assert workspace
    found = dropforge("review", 1, "--json").json["review"]
    assert [found[name] for name in ("run", "asked", "judged", "awaited", "result")] == [1, 3, 0, True, None]
    assert [sorted(pair) for pair in found["left"]] == [
        ["earlier", "first", "id", "input", "instruction", "second"]
    ] * 3
    names = [pair["id"] for pair in found["left"]]
    ended = dropforge("review", 1, "--choose", f"{names[0]}=1")
    assert (ended.code, ended.out) == (0, "1 of 3 pairs are judged blind; to go on: dropforge review 1\n")
    found = dropforge("review", 1, "--choose", f"{names[1]}=2", "--choose", f"{names[2]}=0", "--json").json["review"]
    assert (found["judged"], found["left"], found["result"]["equal"]) == (3, [], 1)
    assert found["result"]["candidate"] + found["result"]["champion"] == 2
    words = "3 of the 78 records that the models did not answer alike, judged blind by "
    for command in ("review", "show"):
        assert words in dropforge(command, 1).out
    assert dropforge("report", 1, "--json").json["report"]["review"] == found["result"]


def test_what_is_no_choice_is_refused(workspace: Any, dropforge: Command) -> None:
    assert workspace
    name = dropforge("review", 1, "--json").json["review"]["left"][0]["id"]
    for arguments, code, words in (
        (("--choose", name), 2, "write PAIR=KEY"),
        (("--choose", f"{name}=3"), 1, "'3' is no choice"),
        (("--choose", "x=1"), 1, "asks about no pair x"),
        ((), 1, "read from a terminal, and this is none"),
    ):
        ended = dropforge("review", 1, *arguments)
        assert ended.code == code
        assert words in ended.err
        assert "\nhint: " in ended.err
    assert dropforge("review", 9).err.startswith("error: there is no run 9\n")


def test_a_damaged_evaluation_hides_no_run(workspace: Any, dropforge: Command) -> None:
    (workspace.settings.state_folder / "runs/1/evaluate.json").write_text("{}")
    assert dropforge("show", 1).code == 0
    assert "run 1 of track default: won" in dropforge("status").out
    assert "damaged" in dropforge("review", 1, "--json").err


def test_the_promotion_waits_for_the_review_and_force_does_not(workspace: Any, dropforge: Command) -> None:
    assert workspace
    refused = dropforge("promote", 1)
    assert refused.code == 1
    assert refused.err == (
        "error: run 1 waits for its blind review: 0 of 3 pairs are judged\nhint: judge the others: dropforge review 1\n"
    )
    assert "0 of 3 pairs are judged blind; to go on: dropforge review 1" in dropforge("show", 1).out
    for pair in dropforge("review", 1, "--json").json["review"]["left"]:
        assert "blind review" in dropforge("promote", 1).err
        assert "blind review" not in dropforge("promote", 1, "--force", "--reason", "I know better").err
        dropforge("review", 1, "--choose", f"{pair['id']}=0")
    assert "blind review" not in dropforge("promote", 1).err, "what it lacks now are the model's files"
