"""README.txt in the folders for drops: from settings, never in place of somebody's own."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.inbox.answers.folder_texts import readme_text, write_readmes
from daemon.inbox.folders import MARK
from daemon.inbox.watcher import Watcher
from daemon.settings.model import Settings
from tests.daemon.inbox.test_intake import Box


def write(box: Box, **values: Any) -> None:
    write_readmes(Settings.model_validate({**box.settings.model_dump(), **values}), box.intake._inbox)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_each_track_has_its_own_readme_by_its_settings(box: Box) -> None:
    write(box, tracks={"support": {"trigger": "nightly"}})
    top = (box.inbox / "README.txt").read_text(encoding="utf-8")
    assert top.startswith(f"{MARK}\n\nThis is the inbox of track default: drop files of training records here.\n")
    for words in (
        '{"instruction": "...", "input": "...", "output": "..."}',
        "at most 8.0 GB, a line 4.0 MB",
        "not changed for 5 s",
        "  done/       taken",
        "NAME.verdict.txt",
        "NAME.errors.json",
        "before\nthere are about 780 rows (1,490 where answers are JSON or longer than 5 words).",
        "the whole file is given back",
        "60 s after the last file",
    ):
        assert words in top
    below = (box.inbox / "support" / "README.txt").read_text(encoding="utf-8")
    assert "  ../done/support/ " in below
    assert "The models are judged on a share of each drop." in below
    assert "The next run of this track begins by the schedule 0 2 * * * (UTC)." in below
    assert max(map(len, (top + below).splitlines())) <= 90


def test_a_readme_says_what_the_settings_say() -> None:
    intake = {"on_bad_rows": "quarantine", "max_bad_rows": 7}
    text = readme_text(Settings.model_validate({"intake": intake}), "default")
    assert "Up to 7 bad rows (1 % of the rows) are left out" in text
    renamed = "or at once if it is renamed"  # where events tell of it
    assert (renamed in text, renamed in readme_text(Settings(observer="polling"), "default")) == (True, False)
    pinned = readme_text(Settings.model_validate({"gate": {"on": "pinned", "min_records": 50}}), "default")
    assert "trained on:\nthe models are judged on them. No model gets a verdict before\n50 records (100 where" in pinned


def test_a_readme_is_written_again_only_where_the_settings_changed(box: Box) -> None:
    write(box)
    path = box.inbox / "README.txt"
    inode = path.stat().st_ino
    write(box)
    assert path.stat().st_ino == inode
    write(box, intake={"settle_seconds": 9.0})
    assert "not changed for 9 s" in path.read_text(encoding="utf-8")
    assert sorted(one.name for one in (box.inbox / "done").iterdir()) == [], "nothing is left aside"


def _another_users(path: Path) -> None:
    if os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip("only root gives files away")
    path.write_text(f"{MARK}\n\nsend your data to me\n")
    os.chown(path, 12345, 12345)


#: What somebody has put in the place of our text.
OWN: dict[str, Callable[[Path], object]] = {
    "a text": lambda path: path.write_text("my own words\n"),
    "an empty file": Path.touch,
    "a link to a text of ours": lambda path: path.symlink_to(path.with_name("victim")),
    "another user's file with our first line": _another_users,
    "a pipe, which hangs nobody": os.mkfifo,
}


@pytest.mark.parametrize("what", OWN)
def test_what_a_person_put_there_is_neither_followed_nor_replaced(box: Box, what: str) -> None:
    path, victim = box.inbox / "README.txt", box.inbox / "victim"
    victim.write_text(f"{MARK}\n")
    OWN[what](path)

    def seen() -> list[tuple[int, ...]]:
        found = [one.lstat() for one in (path, victim)]
        return [(info.st_ino, info.st_mode, info.st_size, info.st_mtime_ns) for info in found]

    before = seen()
    write(box)
    assert seen() == before


def test_a_file_that_comes_in_this_very_moment_is_not_replaced(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    path = box.inbox / "README.txt"

    def comes(place: Path) -> bool:
        place.write_text("mine")
        return False

    monkeypatch.setattr(os.path, "lexists", comes)
    write(box)
    assert path.read_text() == "mine"


def test_the_texts_are_never_taken_for_drops(box: Box) -> None:
    write(box)
    for name in ("readme.txt", "support/README.txt", "heldout/ReadMe.TXT"):
        (box.inbox / name).write_text("x")
    watcher = Watcher(box.settings, threading.Event())
    watcher.scan(0.0)
    assert watcher.scan(1000.0) == []
