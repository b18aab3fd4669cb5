"""Whoever may write into the inbox does not choose what a track is judged on: other users, by their own hands."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlmodel import col, select

from daemon.state.database import transaction
from daemon.state.tables import Drop, Run
from daemon.system.folders import StateFolder, WorkFolder
from daemon.views.overview import Overview
from tests.chaos.house import START, Daemon, build, records

#: Users and a group that no machine has: the inbox is the group's, the settings are the owner's.
OWNER, STRANGER, GROUP = 61_001, 61_002, 61_000


class Yard:
    """A workspace whose inbox two users may write into, one of whom owns the settings."""

    def __init__(self, folder: Path, gate: str) -> None:
        self.folder = folder
        self.inbox = folder / "inbox"
        build(folder)
        settings = folder / "dropforge.toml"
        settings.write_text(f"{settings.read_text()}{gate}")
        os.chown(settings, OWNER, GROUP)
        for place in (self.inbox, *(path for path in self.inbox.rglob("*") if path.is_dir())):
            os.chown(place, -1, GROUP)
            place.chmod(0o2770)
        self.daemon = Daemon(folder, START)
        self.now = START

    def put(self, user: int, place: str, data: bytes, umask: int = 0o022) -> None:
        """Let a user write a file into the inbox, in a process of its own."""
        subprocess.run(
            ["/bin/sh", "-c", f"umask {umask:03o}; cat > '{self.inbox / place}'"],
            input=data,
            check=True,
            user=user,
            group=GROUP,
            extra_groups=[],
        )

    def night(self) -> list[str]:
        """Take in what lies there and let a run end; return the held-out files that it was judged with."""
        self.now += 1000
        self.put(OWNER, f"{self.now}.jsonl", records(str(self.now)))
        self.daemon.take_in(self.now)
        self.daemon.finish_runs(self.now)
        with transaction(self.daemon.engine) as session:
            run = session.exec(select(Run).order_by(col(Run.id).desc())).first()
            assert run is not None
            assert run.outcome == "not_shown_better"
            used = select(Drop.name).where(col(Drop.id).in_(run.snapshot or ()), Drop.role == "heldout")
            return list(session.exec(used.order_by(col(Drop.id))).all())

    def states(self) -> dict[str, str]:
        with transaction(self.daemon.engine) as session:
            found = session.exec(select(Drop.name, Drop.state).where(Drop.role == "heldout")).all()
        return dict(found)

    def cli(self, *arguments: str) -> str:
        argv = [sys.executable, "-P", "-m", "daemon", "--config", str(self.folder / "dropforge.toml"), *arguments]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def new_yard() -> Iterator[Callable[[str], Yard]]:
    """A factory of workspaces that other users can reach."""
    # pytest's own folders are closed to other users.
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield lambda gate: Yard(folder, gate)
    # SQLite removes a file of its own there when the last connection is closed, which may be at any time.
    shutil.rmtree(folder, ignore_errors=True)


WRONG = records(*(f"wrong {number}" for number in range(160)))


@pytest.mark.parametrize("on", ["all", "pinned"])
def test_a_strangers_pinned_file_waits_and_the_owners_counts(new_yard: Callable[[str], Yard], on: str) -> None:
    yard = new_yard(f'[gate]\non = "{on}"\n')
    yard.put(OWNER, "heldout/mine.jsonl", records("mine"))
    yard.put(STRANGER, "heldout/wrong.jsonl", WRONG)
    used = yard.night()
    expected = ["mine.jsonl"] if on == "pinned" else []
    assert used == expected
    assert yard.states() == {"mine.jsonl": "accepted" if expected else "proposed", "wrong.jsonl": "proposed"}
    (receipt,) = (yard.inbox / "done").rglob("wrong.jsonl.receipt.json")
    number = next(
        drop.id
        for drop in Overview(StateFolder(yard.daemon.root), WorkFolder(yard.daemon.root)).drops()
        if drop.name == "wrong.jsonl"
    )
    for said in (receipt.read_text(), yard.cli("drops"), yard.cli("drops", "--state", "proposed")):
        assert f"dropforge drops accept {number}" in said


def test_a_file_of_a_stranger_counts_once_it_is_accepted(new_yard: Callable[[str], Yard]) -> None:
    yard = new_yard('[gate]\non = "pinned"\n')
    yard.put(OWNER, "heldout/mine.jsonl", records("mine"))
    yard.put(STRANGER, "heldout/foreign.jsonl", WRONG)
    assert yard.night() == ["mine.jsonl"]
    number = next(
        drop.id
        for drop in Overview(StateFolder(yard.daemon.root), WorkFolder(yard.daemon.root)).drops()
        if drop.name == "foreign.jsonl"
    )
    yard.cli("drops", "accept", str(number), "--reason", "I read it")
    assert yard.night() == ["mine.jsonl", "foreign.jsonl"]


def test_a_file_that_others_may_write_into_is_not_its_owners_word(new_yard: Callable[[str], Yard]) -> None:
    """The folder gives it to the group, so a stranger can put other answers into it while it settles."""
    yard = new_yard('[gate]\non = "pinned"\n')
    yard.put(OWNER, "heldout/mine.jsonl", records("mine"), umask=0o002)
    yard.put(STRANGER, "heldout/mine.jsonl", WRONG)
    used = yard.night()
    assert (used, yard.states()) == ([], {"mine.jsonl": "proposed"})


@pytest.mark.parametrize("name", [str(STRANGER), "nobody-by-this-name"])
def test_others_count_where_the_settings_name_them_and_the_owner_does_not(
    new_yard: Callable[[str], Yard], name: str
) -> None:
    yard = new_yard(f'[gate]\non = "pinned"\npinned_by = ["{name}"]\n')
    yard.put(OWNER, "heldout/mine.jsonl", records("mine"))
    yard.put(STRANGER, "heldout/theirs.jsonl", records("theirs"))
    assert yard.night() == (["theirs.jsonl"] if name == str(STRANGER) else [])
    assert yard.states()["mine.jsonl"] == "proposed"
