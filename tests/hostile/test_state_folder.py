"""A state folder that is another user's, open to others, or taken away under the real daemon; planted settings."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.people import ALICE, DAEMON, GROUP, Box, NewBox


def started(box: Box, *words: str, person: int = DAEMON.number) -> subprocess.CompletedProcess[str]:
    """Start a command that must not stay; return how it ended."""
    argv = [sys.executable, "-P", "-m", "daemon", *words]
    if person == DAEMON.number:
        argv = box.namespace.argv(DAEMON, argv, box.folder, 0o007)
    elif person == 0:
        # In the namespace, where the daemon's user has a name.
        argv = ["nsenter", f"--target={box.namespace._keeper.pid}", "--mount", f"--wd={box.folder}", "--", *argv]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=60, check=False, env=box.environment, stdin=subprocess.DEVNULL
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("words", [("run",), ("worker",)])
def test_who_is_not_the_state_folders_owner_is_refused_with_both_names_and_leaves_nothing(
    new_box: NewBox, words: tuple[str, ...]
) -> None:
    box = new_box()
    done = started(box, *words, person=0)
    made = sorted(path.name for path in box.state.iterdir())
    named = "belongs to dropforge, and this is root" in done.stderr
    remedy = f"sudo -u dropforge dropforge {words[0]}" in done.stderr
    happened = f"exit {done.returncode}, named: {named}, remedy: {remedy}, made: {made}"
    expected = "exit 1, named: True, remedy: True, made: []"
    assert happened == expected, done.stderr


@pytest.mark.timeout(180)
def test_what_root_does_in_the_state_folder_is_its_owners(new_box: NewBox) -> None:
    box = new_box()
    box.start(extra={"DROPFORGE_WORKER": "separate"})
    assert box.stop() == 0
    kept = box.state / "kept"
    for words in (
        ("backup", str(kept)),
        ("backup",),
        ("restore", str(kept)),
        ("web", "--url"),
        ("gc",),
        ("pause", "--reason", "x"),
        ("doctor",),
    ):
        done = started(box, *words, person=0)
        assert done.returncode == 0 or words == ("doctor",), (words, done.stderr)
    strangers = [str(path) for path in (box.state, *box.state.rglob("*")) if path.lstat().st_uid != DAEMON.number]
    box.log.unlink()
    box.start(extra={"DROPFORGE_WORKER": "separate"})
    happened = f"root's: {strangers}, starts: {not box.ended}"
    assert happened == "root's: [], starts: True", box.said()


@pytest.mark.timeout(120)
def test_a_place_that_the_daemons_user_cannot_use_for_a_backup_is_refused_with_an_example(new_box: NewBox) -> None:
    box = new_box()
    box.start(extra={"DROPFORGE_WORKER": "separate"})
    assert box.stop() == 0
    closed = box.folder / "closed"
    closed.mkdir(mode=0o700)
    made = started(box, "backup", "kept", person=0)
    there = started(box, "backup", str(closed / "kept"), person=0)
    for done in (made, there):
        assert done.returncode == 1
        assert "error: user dropforge may not " in done.stderr
        assert "install -d -o dropforge -m 700 /srv/dropforge-backups" in done.stderr
    assert "dropforge restore /" in started(box, "restore", "kept", person=0).stderr
    assert f"user dropforge may not read {closed}" in started(box, "restore", str(closed / "kept"), person=0).stderr


@pytest.mark.timeout(120)
def test_a_state_folder_that_others_may_enter_is_closed_with_a_line(new_box: NewBox) -> None:
    box = new_box()
    box.state.chmod(0o2777)
    box.start(extra={"DROPFORGE_WORKER": "separate"})
    mode = box.state.stat().st_mode & 0o777
    told = sum("state_folder_closed" in line for line in box.said().splitlines())
    box.state.chmod(0o755)
    assert box.stop() == 0
    box.log.unlink()
    box.start(extra={"DROPFORGE_WORKER": "separate"})
    happened = f"{mode:04o} with {told} line, then {box.state.stat().st_mode & 0o777:04o}"
    assert happened == "0700 with 1 line, then 0700"


def link_to_another(box: Box, place: Path) -> None:
    (box.folder / "theirs").mkdir()
    os.chown(box.folder / "theirs", ALICE.number, ALICE.number)
    place.symlink_to(box.folder / "theirs")


def link_to_own(mode: int) -> Callable[[Box, Path], None]:
    def make(box: Box, place: Path) -> None:
        (box.folder / "own").mkdir()
        os.chown(box.folder / "own", DAEMON.number, GROUP)
        (box.folder / "own").chmod(mode)
        place.symlink_to(box.folder / "own")

    return make


def theirs(_box: Box, place: Path) -> None:
    place.mkdir()
    os.chown(place, ALICE.number, ALICE.number)


FOLDERS: dict[str, tuple[str, Callable[[Box, Path], object], str]] = {
    "a link to another user's folder": ("models", link_to_another, "belongs to alice, and this is dropforge"),
    "a link to a folder that all may write": ("models", link_to_own(0o777), "a link to a folder that others may write"),
    "a link to nowhere": ("drops", lambda _box, place: place.symlink_to("/nowhere"), "leads nowhere"),
    "a link to an own folder": ("spool", link_to_own(0o700), "is a link, which the worker does not follow"),
    "another user's folder": ("incoming", theirs, "belongs to alice, and this is dropforge"),
    "a file": ("tracks", lambda _box, place: place.touch(), "is no folder"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_of_the_state_folder_that_is_not_the_daemons_own_is_refused(new_box: NewBox, what: str) -> None:
    box = new_box()
    name, make, words = FOLDERS[what]
    make(box, box.state / name)
    done = started(box, "run")
    happened = f"exit {done.returncode}, said: {words in done.stderr}, traceback: {'Traceback' in done.stderr}"
    assert happened == "exit 1, said: True, traceback: False", done.stderr


@pytest.mark.timeout(120)
def test_models_may_lie_elsewhere_in_an_own_folder(new_box: NewBox) -> None:
    box = new_box()
    link_to_own(0o750)(box, box.state / "models")
    box.start(extra={"DROPFORGE_WORKER": "separate"})
    assert not box.ended


def take_away(box: Box) -> None:
    box.state.rename(box.folder / "elsewhere")


def put_another_there(box: Box) -> None:
    take_away(box)
    box.state.mkdir()
    os.chown(box.state, DAEMON.number, GROUP)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("moved", take_away),
        ("removed", lambda box: shutil.rmtree(box.state, ignore_errors=True)),
        ("replaced by another", put_another_there),
    ],
)
def test_a_state_folder_that_is_taken_away_ends_daemon_and_worker_with_one_line(
    new_box: NewBox, what: str, change: Callable[[Box], object]
) -> None:
    box = new_box()
    box.start()
    box.until(lambda: "worker_started" in box.said())
    before = len(box.said().splitlines())
    assert box.process is not None
    change(box)
    code = box.process.wait(60)
    lines = box.said().splitlines()[before:]
    left = box.state.exists() and sorted(path.name for path in box.state.iterdir())
    happened = f"exit {code}, lines: {len(lines)}, said: {'was moved or removed' in ''.join(lines)}, made anew: {left}"
    expected = f"exit 1, lines: 1, said: True, made anew: {[] if what == 'replaced by another' else False}"
    assert happened == expected, lines
    worker = subprocess.run(["pgrep", "-f", f"worker --lifeline --state {box.state}"], check=False, capture_output=True)
    assert worker.stdout == b"", "the worker is gone as well"


@pytest.mark.timeout(120)
def test_a_dead_intake_ends_the_daemon_in_order_with_its_reason(new_box: NewBox) -> None:
    box = new_box()
    program = (
        "import sys; from daemon import cli, service\n"
        "def die(_self): raise SystemExit('no more')\n"
        "service.IntakeLoop._turn = die\n"
        "sys.exit(cli.main())"
    )
    argv = box.namespace.argv(DAEMON, [sys.executable, "-P", "-c", program, "run"], box.folder, 0o007)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=box.environment)
    reason = "error: the thread that takes files in has ended: SystemExit: no more" in done.stderr
    logged = "intake_ended" in done.stderr
    happened = (
        f"exit {done.returncode}, reason: {reason}, logged: {logged}, in order: {'daemon_stopped' in done.stderr}"
    )
    expected = "exit 1, reason: True, logged: True, in order: True"
    assert happened == expected, done.stderr


@pytest.mark.parametrize("planted", ["settings", "link"])
def test_root_writes_nothing_where_another_users_settings_lead(tmp_path: Path, planted: str) -> None:
    roots, theirs = tmp_path / "roots", tmp_path / "theirs"
    roots.mkdir()
    theirs.mkdir()
    if planted == "settings":
        path = theirs / "dropforge.toml"
        path.write_text(f'state = "{roots}"\n')
    else:
        path = theirs / ".dropforge"
        path.symlink_to(roots)
    for place in (theirs, path):
        os.lchown(place, ALICE.number, ALICE.number)
    argv = [sys.executable, "-P", "-m", "daemon", "web", "--url"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_")}
    done = subprocess.run(argv, cwd=theirs, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, list(roots.iterdir())) == (2, []), done.stderr
    assert f"{path} belongs to {ALICE.number}, and this is root" in done.stderr
