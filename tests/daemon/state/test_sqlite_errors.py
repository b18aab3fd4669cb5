"""A state folder that this user may only read, or whose database is broken: words and a remedy, never a traceback."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.queue import drops
from daemon.state.events import Word
from daemon.state.layout import DATABASE_NAME
from daemon.system.programs import user

SCRIPT = Path(sys.executable).parent / "dropforge"
#: Root may write whatever the modes say; without these rights it is a user as any other.
AS_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"] if os.geteuid() == 0 else []
needs_user = pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None and "CI" not in os.environ, reason="root, and no setpriv"
)
WHY = ("--reason", "x")
CHANGES = [
    ("drops", "withdraw", "1", *WHY),
    ("drops", "restore", "2", *WHY),
    ("hook",),
    ("cancel", "3"),
    ("retry", "2"),
    ("promote", "1"),
    ("promote", "1", "--force", *WHY),
    ("rollback", *WHY),
    ("gc",),
]
QUESTIONS = [("status",), ("drops",), ("runs",), ("show", "1"), ("champion",), ("history",), ("report", "1")]


def chmod(place: Path, change: str) -> None:
    subprocess.run(["chmod", "-R", change, place], check=True)


@pytest.fixture
def workspace(lived_in: Any) -> Iterator[Any]:
    """Give the lived-in workspace with a hook; drop 2 is withdrawn, and all can be deleted when the test is over."""
    with (lived_in.folder / "dropforge.toml").open("a") as file:
        file.write('\n[hooks]\nafter_promotion = ["true"]\n')
    drops.withdraw(lived_in.engine, 2, Word("x", lived_in.now), lived_in.settings)
    with lived_in.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE promotion SET hook_state = 'failed' WHERE hook_state IS NOT NULL")
    yield lived_in
    chmod(lived_in.settings.state_folder, "u+rwX")


def as_user(folder: Path, *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Run commands side by side; return exit code, standard output and error of each."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begun = [subprocess.Popen([*AS_USER, SCRIPT, *words], cwd=folder, **pipes) for words in commands]
    said = [process.communicate() for process in begun]
    return [(process.returncode, *both) for process, both in zip(begun, said, strict=True)]


def words_of(err: str) -> list[str]:
    """Return the beginnings of the lines of an error: what was wrong, and what to do."""
    return [line.partition(" ")[0] for line in err.splitlines()]


@needs_user
def test_a_state_that_may_only_be_read_is_named_with_user_and_remedy(workspace: Any) -> None:
    chmod(workspace.settings.state_folder, "a-w")
    for code, out, err in as_user(workspace.folder, CHANGES[0], CHANGES[2]):
        assert (code, out, words_of(err)) == (1, "", ["error:", "hint:"]), err
        expected = f"error: user {user()} may not use the state database {workspace.settings.state_folder}"
        assert err.startswith(f"{expected}/{DATABASE_NAME}: attempt to write a readonly database\n")
        assert "must be able to read and write it and its folder" in err
        assert "sudo -u USER dropforge" in err


def _unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _no_database(path: Path) -> None:
    path.write_bytes(b"x" * 8192)


def _malformed(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))


@pytest.mark.parametrize(
    ("harm", "remedy"),
    [(_unreadable, ""), (_no_database, "dropforge restore"), (_malformed, "dropforge restore")],
)
def test_a_database_that_cannot_be_used_is_said_in_words(
    workspace: Any, dropforge: Callable[..., Any], harm: Callable[[Path], None], remedy: str
) -> None:
    path = workspace.settings.state_folder / DATABASE_NAME
    harm(path)
    for words in (*CHANGES, *QUESTIONS):
        done = dropforge(*words)
        assert (done.code, words_of(done.err)) == (1, ["error:", "hint:"]), words
        assert str(path) in done.err, words
        assert remedy in done.err, words


def test_a_database_of_another_version_is_named_as_such(workspace: Any, dropforge: Callable[..., Any]) -> None:
    with workspace.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE 'drop' RENAME COLUMN reason TO why")
    done = dropforge(*CHANGES[0])
    assert (done.code, words_of(done.err)) == (1, ["error:", "hint:"])
    assert "is not of this version: no such column: drop.reason" in done.err


def test_an_error_of_our_own_keeps_its_traceback(
    workspace: Any, dropforge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        with workspace.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE promotion SET generation = NULL")

    monkeypatch.setattr("daemon.queue.drops.withdraw", wrong)
    with pytest.raises(Exception, match="NOT NULL constraint failed"):
        dropforge(*CHANGES[0])
