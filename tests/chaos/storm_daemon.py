"""
Forks a daemon for each line on standard input and says its process number: what the storm kills.

    python -m tests.chaos.storm_daemon FOLDER

The daemon has the real dispatcher and the real Slurm executor. Training and evaluation are jobs, the other steps are
done at once. It drops a file into each track that has no open run, until `enough` lies in the folder; then it ends.
"""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from sqlmodel import select

from daemon.dispatch import slurm
from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import Executor
from daemon.inbox.drop_folders import folder_names
from daemon.settings.model import Settings
from daemon.state.database import transaction
from daemon.state.ownership import ShareGone, installation_id, require_share
from daemon.state.run_files import make_attempt_folder
from daemon.state.states import RunState
from daemon.state.tables import Drop, Run
from daemon.state.troubles import Troubles
from daemon.system.clock import now_ms
from pipeline.contract import StepSpec
from tests.chaos.house import Daemon, records, result_of, work

ENOUGH = "enough"
_PROGRAM = (sys.executable, str(Path(__file__).with_name("storm_node.py")))
_OPEN = (RunState.QUEUED, RunState.RUNNING, RunState.WAITING)


class _Scripted(SlurmExecutor):
    """The real executor; each spec says what its step leaves."""

    def submit(self, spec: StepSpec) -> None:
        make_attempt_folder(spec)
        artifact = result_of(spec, "promoted").artifact
        told = {"env": {**spec.env, "ARTIFACT": json.dumps(artifact)}, "grace_seconds": 2.0}
        super().submit(spec.model_copy(update=told))


def _on_nodes(settings: Settings) -> dict[str, Executor]:
    instance = installation_id(settings)
    slurms = _Scripted(instance, settings.work_folder, settings.executor, Troubles(), _PROGRAM)
    return dict.fromkeys(("train", "evaluate"), slurms)


def _serve(folder: Path) -> None:
    slurm.GIVE_UP_SECONDS, slurm._AGAIN_SECONDS = 4.0, 2.0
    daemon, pause = Daemon(folder, now_ms(), _on_nodes), threading.Event()
    while True:
        try:
            require_share(daemon.settings)
            daemon.take_in(now_ms(), time.monotonic())
            daemon.dispatcher.tick(now_ms())
            _work(daemon)
        except OSError:
            traceback.print_exc()  # the share is full, or went away under the intake
        except ShareGone as error:
            print(error.message, flush=True)
        if not _feed(daemon) and (folder / ENOUGH).exists():
            return
        pause.wait(0.1)


def _work(daemon: Daemon) -> None:
    """Play the worker; what it reads may go away at any moment, as the share does."""
    try:
        work(daemon.root, "promoted", daemon.settings.state_folder)
    except Exception:  # noqa: BLE001 - a real step's process would end, and no other
        traceback.print_exc()


def _feed(daemon: Daemon) -> bool:
    """Drop a file into each track that has no open run, unless it is enough; return whether any has one."""
    with transaction(daemon.engine) as session:
        busy = {run.track for run in session.exec(select(Run)) if run.state in _OPEN}
        drops = [drop.track for drop in session.exec(select(Drop))]
    for track in daemon.settings.track_names:
        inbox = daemon.settings.inbox_folder.joinpath(*folder_names(track, "train"))
        if track in busy or any(inbox.glob("*.jsonl")):
            busy.add(track)
        elif not (daemon.folder / ENOUGH).exists():
            number = drops.count(track) + 1
            aside = inbox / ".aside.part"
            aside.write_bytes(records(f"{track} {number}"))
            aside.rename(inbox / f"{number}.jsonl")
            busy.add(track)
    return bool(busy)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for _line in sys.stdin:
        child = os.fork()
        if child == 0:
            log, code = os.open(place / "daemon.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                _serve(place)
                code = 0
            except BaseException:  # noqa: BLE001 - whatever it is, it is in the log
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
