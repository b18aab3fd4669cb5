"""
The daemon's work on a disk that is about to lose power; it says on another disk what it has acknowledged.

python -m tests.chaos.power_cut_target intake|promote WORKSPACE ACKNOWLEDGED [MUTATION]

Ends when it is killed. A mutation leaves a promise out, to see that the test would notice.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from sqlmodel import select

from daemon.inbox import safe_copy
from daemon.inbox.watcher import make_inbox
from daemon.service import Service
from daemon.settings.load import load
from daemon.state import database
from daemon.state.database import transaction
from daemon.state.tables import Promotion, Run
from daemon.system.clock import now_ms
from pipeline import durable
from pipeline.contract import RESULT_NAME, Attempt
from tests.chaos.scripted_steps import ARTIFACTS
from tests.made_artifacts import good_result

Say = Callable[..., None]


class House:
    """The daemon without its threads, on the workspace `folder`."""

    def __init__(self, folder: Path) -> None:
        self.service = Service(load(folder / "dropforge.toml", {}))
        self.engine = self.service._engine
        self.root = self.service._settings.state_folder
        self.inbox = self.service._settings.inbox_folder
        make_inbox(self.service._settings)
        self.service._dispatcher.recover(now_ms())

    def close(self) -> None:
        """Give the lock back."""
        self.engine.dispose()
        self.service._lock.release()

    def take_in(self) -> None:
        """What the intake's thread does at one waking."""
        self.service._intake._scan()

    def turn(self) -> None:
        """One turn of dispatcher and worker."""
        self.service._dispatcher.tick(now_ms())
        for spec in self.service._spool.orders():
            folder = self.root / spec.folder
            artifact = ARTIFACTS[spec.step](Attempt(spec))
            durable.fsync_tree(folder)
            durable.write_json(folder / RESULT_NAME, good_result(spec, artifact).model_dump(mode="json"))
            self.service._spool.entry(spec.key).unlink()


def drop(inbox: Path, name: str) -> str:
    """Put a file into the inbox as a careful sender does; return its sha256."""
    lines = [json.dumps({"instruction": f"say {name} {number}", "output": "x" * 300}) for number in range(40)]
    data = ("\n".join(lines) + "\n").encode()
    durable.write_bytes(inbox / name, data)
    return hashlib.sha256(data).hexdigest()


def intake(house: House, say: Say) -> None:
    """Take one file in after the other."""
    for number in count():
        name = f"{number}.jsonl"
        sha256 = drop(house.inbox, name)
        house.take_in()
        if (house.inbox / "done" / name).exists():
            say("taken", name, sha256)


def promote(house: House, say: Say) -> None:
    """Promote one run after the other."""
    told = 0
    for number in count():
        drop(house.inbox, f"{number}.jsonl")
        house.take_in()
        while told <= number:
            house.turn()
            with transaction(house.engine) as session:
                runs = session.exec(select(Run).where(Run.state == "succeeded")).all()
                done = session.exec(select(Promotion)).all()
            if len(runs) > told:
                told = len(runs)
                last = max(done, key=lambda row: row.generation)
                say("promoted", last.run_id, last.generation, last.model_id)


def _nothing(*_arguments: Any) -> None:
    """Stand in for a promise."""


def leave_out(mutation: str) -> None:
    """Break one promise."""
    if mutation == "commits":
        connect = database._connect

        def careless(*arguments: Any, **named: Any) -> Any:
            made = connect(*arguments, **named)
            made.execute("PRAGMA synchronous=OFF")
            return made

        mock.patch.object(database, "_connect", careless).start()
    elif mutation == "copies":
        mock.patch.object(safe_copy, "os", _Os()).start()
    elif mutation == "models":
        mock.patch.object(durable, "fsync_tree", _nothing).start()
    else:
        raise SystemExit(f"no such mutation: {mutation}")


class _Os:
    """The module `os`, whose fsync does nothing."""

    fsync = staticmethod(_nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def main(mode: str, workspace: str, acknowledged: str, mutation: str = "") -> None:
    """Work until the power is cut."""
    if mutation:
        leave_out(mutation)
    log = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(*words: object) -> None:
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    {"intake": intake, "promote": promote}[mode](House(Path(workspace)), say)


if __name__ == "__main__":
    main(*sys.argv[1:])
