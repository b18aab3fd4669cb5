"""A real daemon in a process of its own, on a workspace with a tiny model that can learn."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, col, select

from daemon.state.database import open_reader
from daemon.state.tables import Drop, Promotion, Run
from pipeline import durable


class Workspace:
    """A folder with settings, inbox and state, and the daemon that works on it."""

    def __init__(self, folder: Path, settings: str = "") -> None:
        """Take a folder; make its inbox and settings, if these are given."""
        self.folder = folder
        self.inbox = folder / "inbox"
        self.state = folder / ".dropforge"
        if settings:
            self.inbox.mkdir()
            (folder / "dropforge.toml").write_text(settings)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.log = folder / "daemon.log"
        self.interpreter = sys.executable
        #: What the interpreter is told to start as `dropforge`.
        self.program = ["-P", "-m", "daemon"]

    def cli(self, *arguments: str, code: int | None = 0) -> str:
        """Run one `dropforge` command in the workspace; return what it printed. Without `code` it may end in any."""
        argv = [sys.executable, "-P", "-m", "daemon", *arguments]
        done = subprocess.run(argv, cwd=self.folder, env=_environment(), capture_output=True, text=True, check=False)
        assert code in {None, done.returncode}, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def drop(self, name: str, rows: list[dict[str, str]]) -> None:
        """Put a file into the inbox by renaming it in, as a careful sender does."""
        aside = self.inbox / ".aside.part"
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        aside.rename(self.inbox / name)

    def start(self) -> None:
        """Start `dropforge run` and wait until it is ready."""
        before = self.log.read_bytes().count(b"daemon_ready") if self.log.exists() else 0
        with self.log.open("ab") as output:
            argv = [self.interpreter, *self.program, "run"]
            self.daemon = subprocess.Popen(
                argv, cwd=self.folder, stdout=output, stderr=output, env=_environment(), start_new_session=True
            )
        self.wait(lambda: self.log.read_bytes().count(b"daemon_ready") > before)

    def stop(self) -> int:
        """End the daemon as systemd does; return its exit code."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait()

    def end(self) -> None:
        """End the daemon if it still runs."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.stop()

    def kill(self) -> None:
        """End the daemon as the kernel does when memory runs out."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait for a condition; the test's own time limit ends a wait in vain, a dead daemon at once."""
        pause = threading.Event()
        while not condition():
            assert self.daemon is None or self.daemon.poll() is None, self.log.read_text()[-3000:]
            pause.wait(0.05)

    def rows(self, table: type[Any]) -> list[Any]:
        """Read all rows of a table."""
        path = self.state / "dropforge.db"
        if not path.exists():
            return []
        engine = open_reader(path)
        with Session(engine) as session:
            found = list(session.exec(select(table).order_by(col(table.id))))
        engine.dispose()
        return found

    def runs(self) -> list[Run]:
        """Read the runs in their order."""
        return self.rows(Run)

    def drops(self) -> list[Drop]:
        """Read the drops in their order."""
        return self.rows(Drop)

    def done_promotions(self) -> list[Promotion]:
        """Read what was promoted, the base model left out."""
        return [row for row in self.rows(Promotion) if row.run_id is not None]

    def wait_for_runs(self, *states: str) -> None:
        """Wait until the runs are in just these states."""
        self.wait(lambda: tuple(run.state for run in self.runs()) == states)

    def wait_for_step(self, run_id: int, step: str, done: int) -> None:
        """Wait until a step of a run is at its `done`th part."""
        pattern = f"runs/{run_id}/attempts/{step}-*/progress.json"

        def far_enough() -> bool:
            with contextlib.suppress(ValueError):
                return any((durable.read_json(path) or {}).get("done", 0) >= done for path in self.state.glob(pattern))
            return False

        self.wait(far_enough)

    def published(self, run_id: int, step: str) -> dict[str, Any]:
        """Return a published artifact."""
        return dict(json.loads((self.state / "runs" / str(run_id) / f"{step}.json").read_text()))

    def processes(self, *words: str) -> list[int]:
        """Return the living processes of this workspace whose command line has all `words`."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                here = str(self.folder) in command or str((entry / "cwd").readlink()).startswith(str(self.folder))
                if here and all(word in command for word in words):
                    found.append(int(entry.name))
        return found


def _environment() -> dict[str, str]:
    """Return our environment without the variables that are for the tests: the daemon refuses what it does not know."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_CHAOS")}
    return {**ours, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def workspace(tmp_path: Path, tiny: Any, tiny_llama: Path) -> Iterator[Workspace]:
    """A workspace whose daemon is gone when the test ends, however it ends."""
    train = "\n".join(f"{key} = {json.dumps(value)}" for key, value in tiny.settings().items())
    text = (
        f'base_model = "{tiny_llama}"\nrun_after_quiet_seconds = 0.5\nreconcile_seconds = 5\ndevice = "cpu"\n'
        f"[intake]\nsettle_seconds = 1\n[split]\nheldout = 0.4\ndev = 0\n[evaluate]\ngeneral = []\n[train]\n{train}\n"
    )
    made = Workspace(tmp_path, text)
    yield made
    made.end()
