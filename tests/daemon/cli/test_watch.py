"""The screen of `watch` at two sizes of terminal, its lines elsewhere, and both in a real terminal."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from daemon.cli import watch
from daemon.cli.watch import Screen
from daemon.queue import run_queue
from daemon.views.now import Now, look
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.contract import PROGRESS_NAME

SCRIPT = Path(sys.executable).parent / "dropforge"
AT = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


def shown(now: Now, width: int, height: int, **options: Any) -> list[str]:
    """Return the lines of the screen, as a terminal of this size has them."""
    console = Console(width=width, height=height, force_terminal=True, color_system=None, **options)
    with console.capture() as capture:
        console.print(Screen(now, AT))
    return capture.get().splitlines()


def now_of(workspace: Any) -> Now:
    return look(Overview(workspace.settings.state_folder))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 12)])
def test_a_screen_is_never_wider_or_higher_than_the_terminal(busy: Any, width: int, height: int) -> None:
    lines = shown(now_of(busy), width, height)
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    assert any(line.endswith("…") for line in lines) or width == 200, "what was cut shows that it was"


def test_a_screen_says_what_goes_on(busy: Any) -> None:
    text = "\n".join(shown(now_of(busy), 80, 24))
    for words in (
        "dropforge  daemon running",
        "run 3  track default",
        "✓ prepare",
        "▶ train",
        "· merge",
        "12/30",
        "40%",
        "1 min 15 s left",
        "loss 0.500   dev loss 0.600   250 tokens/s   about 2.3 GB of memory",
        "2.000 → 0.167",
        "0.733 → 0.183",
        "! track support is paused by ada: the card is lent out",
        "4  default  queued",
        "5  support  queued",
        "1  default",
        "promoted +40.0",
        "failed: out of memory",
    ):
        assert words in text, text


def test_an_idle_workspace_says_so(new_workspace: Any) -> None:
    text = "\n".join(shown(now_of(new_workspace()), 80, 24))
    for words in ("daemon not running; start it: dropforge run", "nothing runs", "nothing waits", "no run has ended"):
        assert words in text


def test_a_long_queue_is_counted(busy: Any) -> None:
    now = now_of(busy)
    many = now.model_copy(update={"queue": tuple(now.queue[0].model_copy(update={"id": n}) for n in range(5, 45))})
    lines = shown(many, 80, 24)
    assert any("more: dropforge status" in line for line in lines)
    assert any("promoted" in line or "failed" in line for line in lines), "what came of the latest keeps its place"
    assert len(lines) <= 24


def test_hostile_words_stay_words(busy: Any) -> None:
    now = now_of(busy)
    bad = now.queue[0].model_copy(update={"error": "\x1b[2J\u202e[red]gone", "paused": None})
    text = "\n".join(shown(now.model_copy(update={"queue": (bad,)}), 200, 50))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[2J\\u202e[red]gone" in text


def test_elsewhere_a_line_is_printed_once_for_what_changes(busy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    said: dict[object, str] = {}
    watch.print_changes(now_of(busy), said)
    first = capsys.readouterr().out
    for words in (
        "run 1 of track default: promoted +40.0",
        "run 2 of track default: failed: out of memory",
        "run 3: train 12/30, loss 0.500, dev loss 0.600",
        "run 5 of track support is queued: track support is paused by ada",
    ):
        assert words in first
    watch.print_changes(now_of(busy), said)
    assert capsys.readouterr().out == ""
    for done, words in ((13, ""), (14, "run 3: train 14/30"), (14, ""), (16, "run 3: train 16/30")):
        busy.progress(busy.settings.state_folder / "runs/3/attempts/train-1", done)
        watch.print_changes(now_of(busy), said)
        assert capsys.readouterr().out.partition(" ")[2].partition(",")[0] == words, "a line each 5 %"
    busy.attempt_ended()
    watch.print_changes(now_of(busy), said)
    assert "run 3: train took" in capsys.readouterr().out
    merging = busy.attempt(run_queue.rescue(busy.engine, busy.tick())[0], "merge", None)
    (merging / PROGRESS_NAME).unlink()
    watch.print_changes(now_of(busy), said)
    assert capsys.readouterr().out.partition(" ")[2] == "run 3: merge\n", "it has begun, and has counted nothing yet"
    durable.write_json(merging / PROGRESS_NAME, {"step": "merge"})
    watch.print_changes(now_of(busy), said)
    assert capsys.readouterr().out == "", "the same words are printed once"


def test_elsewhere_what_comes_back_is_told_again(busy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    said: dict[object, str] = {}
    here = now_of(busy)
    gone = here.model_copy(update={"daemon": here.daemon.model_copy(update={"alive": False})})
    bad = here.model_copy(update={"troubles": {"disk": "it is full"}})
    watch.print_changes(here, said)
    capsys.readouterr()
    told = []
    for now in (gone, here, gone, bad, here, bad):
        watch.print_changes(now, said)
        told.append([line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()])
    runs, ended = [f"the daemon is running, process {here.daemon.pid}"], ["the daemon is not running"]
    assert told == [ended, runs, ended, [*runs, "trouble: disk: it is full"], [], ["trouble: disk: it is full"]]


# --- in a real terminal and as a pipe


def until(ask: Any, seconds: float = 60.0) -> Any:
    """Ask until the answer is there."""
    end = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


class Pane:
    """A terminal of tmux's, on a server of its own."""

    def __init__(self, folder: Path, width: int, height: int, environment: dict[str, str]) -> None:
        self._socket = str(folder / "tmux")
        shell = f"trap : INT; cd {folder} && {SCRIPT} watch; echo ended with $?; exec cat"
        sets = [word for name, value in environment.items() for word in ("-e", f"{name}={value}")]
        size = ["-x", str(width), "-y", str(height)]
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, *sets, "-s", "watch", "sh", "-c", shell)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self._socket, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"},
        )
        return done.stdout

    def text(self, *options: str) -> str:
        return self._tmux("capture-pane", "-p", *options)

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def pane(busy: Any) -> Iterator[Any]:
    opened: list[Pane] = []

    def open_pane(width: int, height: int, **environment: str) -> Pane:
        opened.append(Pane(busy.folder, width, height, environment))
        return opened[-1]

    yield open_pane
    for one in opened:
        one.close()


needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None and not os.environ.get("CI"), reason="needs tmux")


@needs_tmux
def test_in_a_terminal_it_fills_the_screen_and_ctrl_c_gives_it_back(busy: Any, pane: Any) -> None:
    opened = pane(200, 50, NO_COLOR="1")
    until(lambda: "promoted +40.0" in opened.text())
    text = opened.text()
    assert "dropforge  daemon running" in text.splitlines()[0]
    assert "▶ train" in text
    assert "\x1b[3" not in opened.text("-e"), "no colour of the foreground"
    opened.resize(80, 24)
    until(lambda: "promoted +40.0" in opened.text() and "…" in opened.text())
    assert len(opened.text().splitlines()) <= 24
    busy.attempt_ended()
    until(lambda: "✓ train" in opened.text())
    opened.press("C-c")
    until(lambda: "ended with 0" in opened.text())
    assert "daemon running" not in opened.text(), "the screen before it is back"


def test_as_a_pipe_it_prints_lines_and_ends_with_the_signal(busy: Any) -> None:
    # Whoever starts the tests in the background has them ignore SIGINT, and so would what they start.
    argv = ["env", "--default-signal=INT", str(SCRIPT), "watch"]
    with subprocess.Popen(argv, cwd=busy.folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen: list[str] = []
        while "run 5" not in (seen or [""])[-1]:
            seen.append(process.stdout.readline())
        assert not any("\x1b" in line for line in seen)
        busy.attempt_ended()
        while "train took" not in seen[-1]:
            seen.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
