"""
The power is cut while the daemon works: what it has acknowledged is there after the next start.

The disk is ext4 in a file. The working process is killed and the file copied at once, without what the file system had
not written to its disk yet; the copy is mounted, and the daemon recovers on it. What had been acknowledged stands in a
log elsewhere. Each mode is also tried with one promise left out, to see that the test notices. DROPFORGE_CHAOS=whole
(`make chaos`) cuts often. Needs root, mkfs.ext4 and mount.
"""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlmodel import select

from daemon.state.database import transaction
from daemon.state.database_file import DatabaseUnusable, verify
from daemon.state.layout import DATABASE_NAME
from daemon.state.tables import Drop, Promotion, Run, Track
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.models.manifest import MANIFEST_NAME, verify_manifest
from tests.chaos.loop_disk import LoopDisk, needs_root
from tests.chaos.power_cut_target import House
from tests.model_folder import write_model

pytestmark = needs_root
ROOT = Path(__file__).parents[2]
MODES = ("intake", "promote")
#: Acknowledgements after which the power is cut, at least and at most.
CUTS = {"intake": (5, 40), "promote": (2, 6)}
#: A promise that is left out, and where that must show.
MUTATIONS = {"commits": "intake", "copies": "intake", "models": "promote"}


def work_until_the_cut(folder: Path, mode: str, acknowledgements: int, mutation: str = "") -> list[list[str]]:
    """Let a process work on a new disk until it has acknowledged so much; cut; return what it had acknowledged."""
    log = folder / "acknowledged"
    base = folder / "base"
    write_model(base, b"base")
    (base / MANIFEST_NAME).unlink()
    with LoopDisk(folder / "first", 96) as disk:
        settings = (
            f'base_model = "{base}"\nrun_after_quiet_seconds = 0\n[intake]\nsettle_seconds = 0\n'
            "[disk]\nlow_water_bytes = 0\n[gc]\nautomatic = false\n"
        )
        # Or the cut takes it, too, and a run that is queued then has no base model ever after.
        durable.write_bytes(disk.place / "dropforge.toml", settings.encode())
        command = [sys.executable, "-m", "tests.chaos.power_cut_target", mode, str(disk.place), str(log)]
        command += [mutation] if mutation else []
        with (folder / "log").open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        pause = threading.Event()
        while not log.exists() or log.read_bytes().count(b"\n") < acknowledgements:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            pause.wait(0.002)
        process.kill()
        disk.copy_as_after_a_power_cut(folder / "second")
        process.wait()
    return [line.split() for line in log.read_text().splitlines()]


def lost(folder: Path, mode: str, acknowledged: list[list[str]]) -> list[str]:
    """Recover on the copy; return what is wrong with it."""
    # A machine finds its disk where it was: an order names the state folder that it is for.
    (folder / "second" / "disk.img").replace(folder / "first" / "disk.img")
    with LoopDisk(folder / "first", 0) as disk:
        try:
            house = House(disk.place)
            house.take_in()
            verify(house.root / DATABASE_NAME, at_start=True)
        except (DatabaseUnusable, DropforgeError) as error:
            return [error.message]
        try:
            return _JUDGES[mode](house, acknowledged)
        finally:
            house.close()


def _judge_intake(house: House, acknowledged: list[list[str]]) -> list[str]:
    with transaction(house.engine) as session:
        known = {drop.name: drop.sha256 for drop in session.exec(select(Drop).where(Drop.state == "accepted")).all()}
    wrong = []
    for _, name, sha256 in acknowledged:
        stored = house.root / "drops" / f"{sha256}.jsonl"
        places = [place for place in (house.inbox, house.inbox / "done") if (place / name).exists()]
        if known.get(name) != sha256:
            wrong.append(f"{name} has no row")
        if not stored.exists() or durable.sha256_file(stored) != sha256:
            wrong.append(f"{name} is not what was taken")
        if places != [house.inbox / "done"] or not (house.inbox / "done" / f"{name}.receipt.json").exists():
            wrong.append(f"{name} is in {places}")
    return wrong


def _judge_promote(house: House, acknowledged: list[list[str]]) -> list[str]:
    with transaction(house.engine) as session:
        done = session.exec(select(Promotion)).all()
        track = session.get_one(Track, "default")
    wrong = []
    promoted = {(str(row.run_id), str(row.generation), row.model_id) for row in done}
    wrong += [f"the promotion {words} is lost" for words in acknowledged if tuple(words[1:]) not in promoted]
    if len({row.run_id for row in done}) != len(done):
        wrong.append("a run was promoted twice")
    link = house.root / "tracks/default/champion"
    if link.resolve() != (house.root / str(track.champion_path)).resolve():
        wrong.append(f"the link leads to {link.resolve()}, the row to {track.champion_path}")
    for row in done:
        if row.run_id is not None:
            try:
                verify_manifest(house.root / row.model_path)
            except DropforgeError as error:
                wrong.append(error.message)
    if wrong:
        return wrong
    for _ in range(40):
        house.turn()
    with transaction(house.engine) as session:
        runs = session.exec(select(Run)).all()
    return [f"run {run.id} is {run.state}: {run.error}" for run in runs if run.state != "succeeded"]


_JUDGES: dict[str, Callable[[House, list[list[str]]], list[str]]] = {
    "intake": _judge_intake,
    "promote": _judge_promote,
}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DROPFORGE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_acknowledged_before_the_power_was_cut_is_there_afterwards(
    mode: str, tmp_path: Path, whole: bool, seed: int
) -> None:
    dice = random.Random(f"{seed} {mode}")
    cuts, told = (12 if whole else 1), 0
    for number in range(cuts):
        folder = tmp_path / str(number)
        folder.mkdir()
        acknowledged = work_until_the_cut(folder, mode, dice.randint(*CUTS[mode]))
        told += len(acknowledged)
        assert lost(folder, mode, acknowledged) == [], f"seed {seed}, cut {number}, {len(acknowledged)} acknowledged"
    print(f"{mode}: {cuts} cuts, {told} acknowledged, 0 lost (seed {seed})")


def test_a_promise_that_is_left_out_is_noticed(tmp_path: Path, whole: bool, seed: int) -> None:
    mutations = sorted(MUTATIONS)
    for mutation in mutations if whole else [random.Random(seed).choice(mutations)]:
        folder = tmp_path / mutation
        folder.mkdir()
        mode = MUTATIONS[mutation]
        acknowledged = work_until_the_cut(folder, mode, CUTS[mode][1], mutation)
        assert lost(folder, mode, acknowledged) != [], f"seed {seed}, {mutation}"
