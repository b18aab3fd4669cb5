"""Steps as forks of a process that has imported their libraries, with the real steps: without inputs they fail."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.dispatch.attempt import write_spec
from daemon.dispatch.preloaded import Preloaded
from daemon.dispatch.step_process import StepProcess, step_command
from daemon.system.processes import identify
from pipeline import durable, preload
from pipeline.contract import LOG_NAME, RESULT_NAME, SPEC_NAME
from pipeline.errors import EXIT_INTERRUPTED
from tests.made_artifacts import made_spec
from tests.slurm.cluster import wait_for


class Run:
    """A run that this worker prepares."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "runs").mkdir()
        self.preloaded = Preloaded()
        # The first step starts the process that the later ones are forked from.
        assert self.begin("prepare").go(lambda: False).status == "failed"

    def begin(self, step: str, **more: Any) -> StepProcess:
        self.spec = made_spec(self.root, step, **more)
        assert write_spec(self.spec)
        self.folder = self.root / self.spec.folder
        argv = step_command(self.spec, self.folder / SPEC_NAME)
        return StepProcess(self.spec, self.folder, argv, fork=self.preloaded.fork)

    def result(self) -> dict[str, Any]:
        return durable.read_object(self.folder / RESULT_NAME)


def argv_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def pid_of(process: StepProcess) -> int:
    assert process.identity is not None
    return process.identity.pid


def parent_of(process: StepProcess) -> int:
    return int(Path(f"/proc/{pid_of(process)}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = Run(tmp_path_factory.mktemp("run"))
    yield run
    run.preloaded.close()


def test_a_step_is_a_fork_with_its_own_session_folder_log_and_result(run: Run) -> None:
    process = run.begin("merge")
    pid = pid_of(process)
    assert argv_of(parent_of(process))[-1] == "pipeline.preload"
    wait_for(lambda: Path(f"/proc/{pid}/cwd").readlink() == run.folder)
    assert os.getsid(pid) == os.getpgid(pid) == pid
    wait_for(lambda: argv_of(pid)[0].endswith(f"-m pipeline merge {run.folder / SPEC_NAME}"))
    assert process.go(lambda: False).exit_code == 1
    assert run.result()["error"]["message"] in (run.folder / LOG_NAME).read_text()
    # The process that was forked is there for the next step.
    assert run.begin("evaluate").go(lambda: False).exit_code == 1


def test_a_fork_that_is_stopped_before_it_listens_to_signals_is_not_killed(run: Run) -> None:
    process = run.begin("merge", attempt=2)
    assert process.go(lambda: True).exit_code == EXIT_INTERRUPTED
    assert run.result()["status"] in {"failed", "interrupted"}


def test_a_fork_that_is_killed_is_named_by_its_signal(run: Run) -> None:
    process = run.begin("merge", attempt=3)
    os.kill(pid_of(process), signal.SIGKILL)
    result = process.go(lambda: False)
    assert (result.exit_code, "SIGKILL" in result.model_dump_json()) == (137, True)


@pytest.mark.parametrize("more", [{"run": 2}, {"network": True}])
def test_another_run_or_environment_is_a_program_of_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    process = run.begin("merge", attempt=5, **more)
    assert parent_of(process) == os.getpid()
    assert process.go(lambda: False).exit_code == 1


def test_a_step_whose_preloaded_process_is_killed_is_killed_and_the_next_one_is_a_program(tmp_path: Path) -> None:
    run = Run(tmp_path)
    process = run.begin("merge")
    pid = pid_of(process)
    os.kill(parent_of(process), signal.SIGKILL)
    assert process.go(lambda: False).exit_code == 137
    assert identify(pid) is None
    process = run.begin("merge", attempt=2)
    assert parent_of(process) == os.getpid()
    process.kill()
    run.preloaded.close()


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_fork_that_cannot_use_a_gpu_that_is_there_becomes_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool
) -> None:
    code = "import os, pathlib, torch\nfirst = os.getpid()\ntorch.cuda._is_in_bad_fork = lambda: os.getpid() != first\n"
    if has_gpu:
        code += "from pipeline.models import gpu_driver\ngpu_driver.NVIDIA = pathlib.Path(__file__)\n"
    else:
        code += "import atexit, gc, sys\natexit.register(lambda: print(gc.isenabled(), *sys.modules, flush=True))\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    run = Run(tmp_path)
    process = run.begin("merge")
    pid, argv = pid_of(process), list(step_command(run.spec, run.folder / SPEC_NAME))
    wait_for(lambda: argv_of(pid) == (argv if has_gpu else [" ".join(argv)]))
    assert process.go(lambda: False).exit_code == 1
    assert run.result()["status"] == "failed"
    if not has_gpu:
        words = map(str.split, (run.folder / LOG_NAME).read_text().splitlines())
        collects, modules = next((line[0], line) for line in words if "pipeline.__main__" in line)
        assert (collects, "bitsandbytes" in modules, "torch._inductor.compile_fx" in modules) == ("True", True, False)
    run.preloaded.close()


def test_while_a_step_of_its_run_is_not_over_another_one_is_a_program(run: Run) -> None:
    first = run.begin("merge", attempt=6)
    second = run.begin("merge", attempt=7)
    assert parent_of(second) == os.getpid()
    for process in (second, first):
        process.kill()
        assert process.identity is None


def test_what_is_imported_beside_a_gpu_asks_cuda_for_nothing() -> None:
    code = f"""
import os, sys, torch
from pipeline import preload
asked = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
preload.preload({preload.MODULES + preload.LATER_MODULES})
print(asked, "bitsandbytes" in sys.modules, flush=True)
if not os.fork():
    print(torch.cuda._is_in_bad_fork(), flush=True)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\nFalse\n"


def test_a_process_that_nobody_asks_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "IDLE_SECONDS", 0.01)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    serving = threading.Thread(target=preload.serve, args=(theirs,))
    serving.start()
    serving.join()
    monkeypatch.setattr(preload, "IDLE_SECONDS", None)
    ours.close()
    preload.serve(theirs)
    theirs.close()
