"""
A service as README.md installs it, and the people around it: a daemon, two members of its group, a stranger.

They are users of a mount namespace of their own, whose password file knows them, and in which the checkout and the
interpreter can be read by everybody, wherever they lie.
"""

import contextlib
import json
import os
import shlex
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.model_folder import write_model

ROOT = Path(__file__).parents[2]
GROUP = 64200
#: Seconds after which what should happen has not.
PATIENCE = 60.0
_QUICK = """
base_model = "base"
reconcile_seconds = 1
run_after_quiet_seconds = 3600
[tracks.support]
[disk]
low_water_bytes = 0
[intake]
settle_seconds = 0
"""


@dataclass(frozen=True)
class Person:
    """A user of the namespace; a member of the group `dropforge` may write into the inbox."""

    name: str
    number: int
    is_member: bool = True


DAEMON = Person("dropforge", 64201)
ALICE = Person("alice", 64202)
BOB = Person("bob", 64203)
STRANGER = Person("stranger", 64204, is_member=False)
PEOPLE = (DAEMON, ALICE, BOB, STRANGER)


class Namespace:
    """A mount namespace that lives until `close`."""

    def __init__(self, scratch: Path) -> None:
        """Make it; `scratch` is an empty folder for what is put into places there."""
        self._keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-ec", _script(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "ready\n", "the namespace could not be made"

    def close(self) -> None:
        """Let it go with the last process in it."""
        self._keeper.communicate()

    def argv(self, person: Person, words: list[str], folder: Path, umask: int) -> list[str]:
        """Return a command that runs `words` as `person` in `folder`; it becomes the process itself, no child of it."""
        groups = f"--groups={GROUP}" if person.is_member else "--clear-groups"
        group = GROUP if person is DAEMON else person.number
        return [
            *("nsenter", f"--target={self._keeper.pid}", "--mount", f"--wd={folder}", "--"),
            *("setpriv", f"--reuid={person.number}", f"--regid={group}", groups, "--inh-caps=-all"),
            *("sh", "-c", f'umask {umask:04o} && exec "$@"', "sh", *words),
        ]


class Box:
    """One installation: settings, inbox, state folder, a base model, and the daemon once it is started."""

    def __init__(self, namespace: Namespace, folder: Path, settings: str = "", inbox_mode: int = 0o3770) -> None:
        """Lay it out in `folder`; `settings` are added at the end, in `[intake]` unless they begin another table."""
        self.namespace = namespace
        self.folder = folder
        self.inbox, self.state = folder / "inbox", folder / "state"
        self.log = folder / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "dropforge.toml").write_text(_QUICK + settings)
        write_model(folder / "base", b"base weights")
        # Without the sticky bit it is an administrator's, by mistake: the daemon sets it on one of its own.
        owner = DAEMON.number if inbox_mode & stat.S_ISVTX else 0
        for place, mode, user in ((self.inbox, inbox_mode, owner), (self.state, 0o700, DAEMON.number)):
            place.mkdir()
            os.chown(place, user, GROUP)
            place.chmod(mode)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the daemon and of who asks it."""
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DROPFORGE_CONFIG": str(self.folder / "dropforge.toml"),
            "DROPFORGE_STATE": str(self.state),
            "DROPFORGE_INBOX": str(self.inbox),
            "HOME": str(self.state),
        }

    def start(self, *prefix: str, extra: Mapping[str, str] | None = None) -> None:
        """Start the daemon and wait until it is ready; `prefix` may be a tracer."""
        words = [sys.executable, "-P", "-m", "daemon", "run"]
        argv = [*prefix, *self.namespace.argv(DAEMON, words, self.folder, 0o007)]
        with self.log.open("ab") as log:
            environment = {**self.environment, **(extra or {})}
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.until(lambda: "daemon_ready" in self.said() or self.ended)

    def stop(self) -> int | None:
        """End the daemon; return its exit code."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    @property
    def ended(self) -> bool:
        """Whether the daemon has ended by itself."""
        return self.process is not None and self.process.poll() is not None

    def said(self) -> str:
        """Return the daemon's log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, is_true: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait until something is true. Raises `AssertionError` with the daemon's log if it does not come in time."""
        end, pause = time.monotonic() + patience, threading.Event()
        while not is_true():
            assert time.monotonic() < end, f"it did not come:\n{self.said()[-4000:]}"
            pause.wait(0.05)

    def shell(self, person: Person, script: str, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
        """Run a shell script as somebody, in the inbox if they may enter it."""
        folder = self.inbox if person.is_member else self.folder
        argv = self.namespace.argv(person, ["sh", "-c", script], folder, umask)
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env=self.environment,
            stdin=subprocess.DEVNULL,
        )

    def popen(self, person: Person, *words: str) -> subprocess.Popen[str]:
        """Start a program as somebody, in the inbox."""
        argv = self.namespace.argv(person, list(words), self.inbox, 0o022)
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=self.environment)

    def cli(self, person: Person, *words: str, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
        """Run a `dropforge` command as somebody."""
        return self.shell(person, shlex.join([sys.executable, "-P", "-m", "daemon", *words]), umask)

    def status(self) -> dict[str, Any]:
        """Return what `dropforge status --json` says to the daemon's user."""
        found: dict[str, Any] = json.loads(self.cli(DAEMON, "status", "--json").stdout)
        return found

    def drop(self, person: Person, name: str, text: str, folder: str = ".") -> None:
        """Let somebody drop a file, complete at once."""
        done = self.shell(person, f"printf %s {shlex.quote(text)} > {folder}/.x && mv {folder}/.x {folder}/{name}")
        assert done.returncode == 0, done.stderr

    def sparse(self, person: Person, name: str, size: int) -> None:
        """Let somebody drop a file of `size` bytes that takes no room."""
        done = self.shell(person, f"truncate --size {size} .x && mv .x {name}")
        assert done.returncode == 0, done.stderr

    def events(self, kind: str) -> list[Any]:
        """Return what the database has noted of a kind."""
        with contextlib.closing(sqlite3.connect(self.state / "dropforge.db")) as connection:
            return connection.execute("SELECT detail FROM event WHERE kind = ?", (kind,)).fetchall()

    def is_filed(self, name: str, home: str = "done") -> bool:
        """Whether a file has been taken and lies somewhere below `done/` or `rejected/`."""
        return any((self.inbox / home).rglob(name))


#: A factory of installations.
NewBox = Callable[..., Box]


def rows(*words: str) -> str:
    """Return a good drop with a record a word."""
    return "".join(json.dumps({"instruction": f"say {word}", "output": word}) + "\n" for word in words)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder that everybody may enter: pytest's own are closed to other users."""
    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def _script(scratch: Path) -> str:
    """Return the commands that open what is closed to other users, and make the people known."""
    accounts = Path("/etc/passwd").read_text() + "".join(
        f"{one.name}:x:{one.number}:{one.number}::/:/bin/sh\n" for one in PEOPLE
    )
    members = ",".join(one.name for one in PEOPLE if one.is_member)
    (scratch / "passwd").write_text(accounts)
    (scratch / "group").write_text(Path("/etc/group").read_text() + f"dropforge:x:{GROUP}:{members}\n")
    lines = [f"mount --bind {shlex.quote(str(scratch / name))} /etc/{name}" for name in ("passwd", "group")]
    needed = [place for place in dict.fromkeys((ROOT, Path(sys.prefix), Path(sys.base_prefix))) if _closed_above(place)]
    for number, place in enumerate(needed):
        (scratch / str(number)).mkdir()
        lines.append(f"mount --rbind {shlex.quote(str(place))} {shlex.quote(str(scratch / str(number)))}")
    closed = sorted({str(_closed_above(place)) for place in needed})
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(folder)}" for folder in closed]
    for number, place in enumerate(needed):
        lines.append(f"mkdir -p {shlex.quote(str(place))}")
        lines.append(f"mount --rbind {shlex.quote(str(scratch / str(number)))} {shlex.quote(str(place))}")
    return "\n".join([*lines, "echo ready", "read -r never"])


def _closed_above(place: Path) -> Path | None:
    """Return the uppermost folder on the way to `place`, itself left out, that others may not enter."""
    return next((folder for folder in reversed(place.parents) if not folder.stat().st_mode & 0o001), None)
