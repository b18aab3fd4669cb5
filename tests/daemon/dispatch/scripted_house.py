"""A dispatcher with one run, whose training is ordered here or is a job of a scripted Slurm, where nothing begins."""

import threading
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from daemon.dispatch.dispatcher import Dispatcher
from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import LocalExecutor
from daemon.queue import states
from daemon.settings.model import Settings
from daemon.settings.sections import ExecutorSettings
from daemon.state import run_files
from daemon.state.database import transaction
from daemon.state.troubles import Troubles
from daemon.system.folders import WorkFolder
from pipeline import durable
from pipeline.contract import JOB_NAME, RESULT_NAME, SPEC_NAME, StepSpec
from tests.daemon.dispatch.test_dispatcher import NOW, ScriptedExecutor, add_drop
from tests.run_owner import spool_of

#: What is no job's number keeps none from being found.
_ODD = "".join(f"{number}|dropforge-id.1-train-1|fence|RUNNING|None|n\\n" for number in ("²", "7" * 5000, "-1", ""))
#: Slurm's commands, a file per job: nothing ever begins, and `held` says why.
COMMANDS = {
    "sbatch": """
        for word; do case $word in --job-name=*) name=${word#*=};; --comment=*) fence=${word#*=};; esac; done
        number=$(($(ls jobs | wc -l) + 1))
        echo "$number|$name|$fence|PENDING|JobHeldUser|" > jobs/$number; echo $number
    """,
    "squeue": f"[ -e silent ] && exit 1; printf '{_ODD}'; cat jobs/[0-9]* 2> /dev/null || true",
    "scontrol": '[ "$1" != release ] || sed -i "s/JobHeldUser/$(cat held 2> /dev/null || echo Priority)/" jobs/$2',
    "scancel": 'for last; do :; done; : > "jobs/$last"',
}


class House:
    """A daemon's dispatcher with a run of one drop; `slurm` is the folder of the scripted cluster, if there is one."""

    def __init__(self, engine: Engine, settings: Settings, cluster: Path | None) -> None:
        self.engine, self.settings, self.cluster = engine, settings, cluster
        add_drop(engine, "a")
        with transaction(engine) as session:
            states.ensure_track(session, "default", NOW)
        self.begin()

    @property
    def root(self) -> WorkFolder:
        return self.settings.work_folder

    @property
    def attempt(self) -> Path:
        """The folder of the attempt at the training."""
        return self.root / run_files.attempt_folder(1, "train", 1)

    def again(self) -> None:
        """Let a new daemon adopt the run."""
        self.stop()
        self.begin()

    def begin(self) -> None:
        told = ExecutorSettings(kind="slurm", poll_seconds=0.1)
        self.slurm = SlurmExecutor("id", self.root, told, Troubles())
        local, nodes = LocalExecutor(spool_of(self.settings.state_folder)), {"train": self.slurm}
        nodes = {} if self.cluster is None else nodes
        self.dispatcher = Dispatcher(self.engine, self.settings, local, Troubles(), nodes)
        self.dispatcher.recover(NOW)

    def stop(self) -> None:
        self.slurm.stop()

    def prepare(self) -> None:
        """Have the data prepared, and the training ordered, whose grace is over at once; nobody looks at it yet."""
        self.dispatcher.tick(NOW)
        self.do_step("prepare")
        self.dispatcher.tick(NOW)
        self.stop()
        place = self.attempt / SPEC_NAME
        durable.write_json(place, {**durable.read_json(place), "grace_seconds": 0.0})

    def do_step(self, step: str) -> None:
        """Write the result of the first attempt at a step, as a worker does."""
        folder = self.root / run_files.attempt_folder(1, step, 1)
        spec = StepSpec.model_validate(durable.read_json(folder / SPEC_NAME))
        durable.write_json(folder / RESULT_NAME, ScriptedExecutor().good(spec).model_dump(mode="json"))
        (spool_of(self.settings.state_folder).queue / f"{spec.key}.json").unlink(missing_ok=True)

    def submit(self) -> StepSpec:
        """Have the training submitted, as its job if there is a cluster."""
        self.prepare()
        self.again()
        if self.cluster is not None:
            self.wait_until(lambda: durable.read_object(self.attempt / JOB_NAME).get("released"))
        return StepSpec.model_validate(durable.read_json(self.attempt / SPEC_NAME))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Let the dispatcher work; the test's own time limit ends a wait in vain."""
        pause = threading.Event()
        while not condition():
            self.dispatcher.tick(NOW)
            pause.wait(0.01)

    def jobs(self) -> list[str]:
        """Return the lines of the jobs that are not cancelled."""
        if self.cluster is None:
            return []
        # sed writes its own files there.
        return [one for one in map(_text, (self.cluster / "jobs").glob("[0-9]*")) if one]


def _text(path: Path) -> str:
    return path.read_text()
