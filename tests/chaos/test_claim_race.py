"""
Four processes claim and finish runs as fast as they can: 400 runs with DROPFORGE_CHAOS=whole, else 80.

Run as a script it is one of them: `test_claim_race.py DATABASE BEGIN`, where BEGIN is how its transactions begin.
"""

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, select

from daemon.queue import run_queue
from daemon.queue.states import LostClaim
from daemon.state import database
from daemon.state.database import migrate, open_engine, transaction
from daemon.state.states import DropState
from daemon.state.tables import Drop, Event, Run, Track
from pipeline.config import RunConfig
from tests import run_owner

PROCESSES = 4


class Race(NamedTuple):
    """How it went."""

    claims: Counter[int]
    """How often each run was claimed."""
    lock_errors: int

    @property
    def doubles(self) -> int:
        return sum(number - 1 for number in self.claims.values())


def prepare(path: Path, runs: int) -> None:
    """Queue the runs, each of a track of its own."""
    migrate(path)
    with transaction(open_engine(path)) as session:
        for number in range(runs):
            session.add(
                Drop(
                    track=f"t{number}",
                    role="train",
                    state=DropState.ACCEPTED,
                    name_bytes=b"a",
                    name="a",
                    sha256=f"{number:064x}",
                    size_bytes=1,
                    rows=1,
                    received_at=1,
                )
            )
            run_queue.enqueue(session, f"t{number}", "drop", 0, 0)


def run_race(path: Path, begin: str) -> Race:
    """Start the racers together and add up what they did."""
    racers = [
        subprocess.Popen(
            [sys.executable, __file__, str(path), begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(PROCESSES)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    claims: Counter[int] = Counter()
    lock_errors = 0
    for racer in racers:
        out, _ = racer.communicate()
        assert racer.returncode == 0
        done = json.loads(out)
        claims.update(done["claims"])
        lock_errors += done["lock_errors"]
    return Race(claims, lock_errors)


@pytest.mark.timeout(300)
def test_no_run_is_claimed_twice_and_no_process_meets_a_lock(tmp_path: Path, whole: bool) -> None:
    runs = 400 if whole else 80
    path = tmp_path / "state.db"
    prepare(path, runs)
    race = run_race(path, "BEGIN IMMEDIATE")
    print(f"{PROCESSES} processes, {runs} runs: {race.doubles} double claims, {race.lock_errors} lock errors")
    assert (race.doubles, race.lock_errors) == (0, 0)
    assert set(race.claims) == set(range(1, runs + 1))
    with transaction(open_engine(path)) as session:
        states = session.exec(select(Run.state)).all()
        kinds = Counter(session.exec(select(Event.kind)).all())
    assert set(states) == {"succeeded"}
    assert (kinds["run_claimed"], kinds["run_succeeded"]) == (runs, runs)


@pytest.mark.timeout(300)
def test_the_same_race_goes_wrong_when_transactions_begin_without_the_write_lock(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    prepare(path, 24)
    race = run_race(path, "BEGIN")
    print(f"BEGIN, deferred: {race.doubles} double claims, {race.lock_errors} lock errors")
    assert race.doubles + race.lock_errors > 0


def configure(_session: Session, track: Track) -> RunConfig:
    return RunConfig(track=track.name, base_model="/base", base_model_id="b" * 64, salt=track.salt)


def race(path: Path, begin: str) -> None:
    """Claim and finish until nothing is left; print what was claimed and how often the database was locked."""
    engine = database._engine(path, partial(database._connect, path, foreign_keys=True), begin)
    print("ready", flush=True)
    sys.stdin.readline()
    claims, lock_errors = [], 0
    while True:
        try:
            claim = run_owner.claim(engine, 100, configure)
            if claim is None:
                break
            claims.append(claim.run_id)
        except OperationalError:
            lock_errors += 1
            continue
        try:
            run_owner.finish(engine, claim, run_queue.Ending("worse", "it lost"), 200)
        except (OperationalError, LostClaim):
            lock_errors += 1
    print(json.dumps({"claims": claims, "lock_errors": lock_errors}))


if __name__ == "__main__":
    race(Path(sys.argv[1]), sys.argv[2])
