"""
The process of a step: its environment, its start, its end, and the result of a step that left none.

A step gets a new session and process group, and one end of a pipe: it does nothing before a byte comes, and
stops when the other end closes, in whatever way the process that started it ends.
"""

import contextlib
import fnmatch
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import structlog

from daemon.dispatch.preloaded import CannotFork, Fork, Program, fork_nothing
from daemon.system.processes import Identity, identify, kill_group, signal_name
from daemon.system.threads import thread_variables
from pipeline.contract import LIFELINE, LOG_NAME, StepError, StepResult, StepSpec
from pipeline.errors import EXIT_BAD_DATA, EXIT_DISK_FULL, EXIT_INTERRUPTED
from pipeline.models.untrusted import ENDED_BY, SECONDS

_MACHINE = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_*", "TZ", "TMPDIR", "XDG_*")
_LIBRARIES = ("LD_*", "PYTHON*", "VIRTUAL_ENV", "HF_HOME", "HF_HUB_CACHE", "TORCH*", "PYTORCH*", "TRITON*", "BNB_*")
_GPU = ("CUDA*", "NVIDIA*", "NCCL_*", "GLOO_*", "HIP*", "ROCR*")
_PROCESSOR = ("OMP_*", "GOMP_*", "MKL_*", "OPENBLAS*", "VLLM_CPU_*")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
#: Variables of the worker's own environment that a step may see: paths and hardware settings, no secrets.
ALLOWED_ENVIRONMENT = (*_MACHINE, *_LIBRARIES, *_GPU, *_PROCESSOR)
#: Further variables for a step that uses the network, in addition to its API key.
NETWORK_ENVIRONMENT = (*_PROXIES, *map(str.lower, _PROXIES), "SSL_CERT_FILE", "SSL_CERT_DIR")
#: Variables that a step takes from its spec's environment: the daemon sets no others.
STEP_VARIABLES = ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "DROPFORGE_DEVICE")
_POLL_SECONDS = 0.2
StepCommand = Callable[[StepSpec, Path], Sequence[str]]
"""The argument list that does a step, from its spec and where that lies."""
ForkStep = Callable[[StepSpec, Program, int], Fork]
"""Fork the step of a spec with the lifeline's descriptor, as `Preloaded.fork` does."""
_T = TypeVar("_T")
log = structlog.get_logger()


def step_command(spec: StepSpec, path: Path) -> Sequence[str]:
    """Return the argument list that runs the step of the spec at `path`: `python -P -m pipeline STEP PATH`."""
    # -P: the folder that it is started in must not be looked through for modules.
    return (sys.executable, "-P", "-m", "pipeline", spec.step, str(path.absolute()))


class StepProcess:
    """A step's process: it waits until `go` lets it begin, or `kill` ends it."""

    def __init__(
        self,
        spec: StepSpec,
        folder: Path,
        argv: Sequence[str],
        variables: Mapping[str, str] = MappingProxyType({}),
        fork: ForkStep = fork_nothing,
    ) -> None:
        """
        Start `argv` in the attempt's `folder`, its output appended to the log; it does nothing before `go`.

        `variables` are given in addition to those that a step may see. The process comes from `fork` or, if that raises
        `CannotFork`, is started as a program. Raises `OSError` if it cannot be started.
        """
        self._spec = spec
        self._process: subprocess.Popen[bytes] | Fork
        with (folder / LOG_NAME).open("ab") as log:
            program = Program(argv, folder, {**_environment(spec), **variables}, log)
            try:
                self._process, self._keep = _with_lifeline(partial(fork, spec, program))
            except CannotFork:
                self._process, self._keep = _with_lifeline(partial(_begin, program))

    @property
    def identity(self) -> Identity | None:
        """The process; `None` if it has ended."""
        return identify(self._process.pid)

    def kill(self) -> None:
        """Kill the process and its process group, and wait for its end; to be called instead of `go`."""
        os.close(self._keep)
        kill_group(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def go(self, is_to_stop: Callable[[], bool]) -> StepResult:
        """
        Let the step begin, wait for its end, and return the result for the case that it wrote none (`result_of_dead`).

        Once `is_to_stop()` is true it gets SIGTERM, and SIGKILL `grace_seconds` later. At its end its process group is
        killed.
        """
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                os.write(self._keep, b"g")
            log.info("step_started", key=self._spec.key, pid=self._process.pid)
            stopped = self._wait(is_to_stop)
        finally:
            os.close(self._keep)
        exit_code = self._process.wait()
        log.info("step_ended", key=self._spec.key, exit_code=exit_code)
        return result_of_dead(self._spec, exit_code, stopped=stopped)

    def _wait(self, is_to_stop: Callable[[], bool]) -> bool:
        """Wait for the end, stop the step once `is_to_stop()`, kill its group; return whether it was stopped."""
        process, stopped = self._process, False
        while process.poll() is None and not stopped:
            if is_to_stop():
                log.info("step_stopping", key=self._spec.key, grace_seconds=self._spec.grace_seconds)
                process.send_signal(signal.SIGTERM)
                stopped = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._spec.grace_seconds if stopped else _POLL_SECONDS)
        kill_group(process.pid, signal.SIGKILL)
        process.wait()
        return stopped


def _with_lifeline(start: Callable[[int], _T]) -> tuple[_T, int]:
    """Call `start` with the reading end of a new pipe, then close that; return its result and the writing end."""
    lifeline, keep = os.pipe()
    try:
        return start(lifeline), keep
    except BaseException:
        os.close(keep)
        raise
    finally:
        os.close(lifeline)


def _begin(program: Program, lifeline: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - an argument list of our own, never a shell
        program.argv,
        cwd=program.folder,
        env={**program.environment, LIFELINE: str(lifeline)},
        stdin=subprocess.DEVNULL,
        stdout=program.log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lifeline,),
    )


def _environment(spec: StepSpec) -> dict[str, str]:
    """
    Return the environment of a step: the allowed variables of this process's environment and of the spec's.

    It gets a thread per free processor (`thread_variables`). Unless a variable configures it, torch's GPU allocator
    uses expandable segments. A step with network access also gets proxies, certificates and the API key, whose variable
    is named in the spec.
    """
    names = [*ALLOWED_ENVIRONMENT]
    if spec.network:
        names += [*NETWORK_ENVIRONMENT, spec.config.judge.api_key_env]
    seen = {name: value for name, value in os.environ.items() if any(fnmatch.fnmatchcase(name, form) for form in names)}
    if "PYTORCH_CUDA_ALLOC_CONF" not in seen:  # the older name
        # Micro-batches differ in length, which fragments fixed segments.
        seen.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    chosen = {name: spec.env[name] for name in STEP_VARIABLES if name in spec.env}
    return {**seen, **thread_variables(spec.parallel), **chosen}


def result_of_dead(spec: StepSpec, returncode: int | None, *, stopped: bool = False) -> StepResult:
    """
    Return the result of a step that ended without writing one, with message and hint for its `returncode`.

    It is "interrupted" if the step was `stopped`, or its code says so (SIGTERM included), else "failed". For a signal,
    `returncode` is minus its number, the result's code 128 plus it; `None`, if the worker was killed, means SIGKILL.
    """
    # A cluster signals the whole job to stop, the step before it listens, too.
    if stopped or returncode in {EXIT_INTERRUPTED, -signal.SIGTERM}:
        words = StepError(message=f"step {spec.step} was stopped before it could leave a result")
        return StepResult(key=spec.key, fence=spec.fence, status="interrupted", exit_code=EXIT_INTERRUPTED, error=words)
    if returncode is None:
        message = f"step {spec.step}: its process vanished without a result"
        hint, code = "see the log of the system", 128 + signal.SIGKILL
    elif returncode == EXIT_DISK_FULL:
        message = f"the disk of {spec.root} is full: step {spec.step} could not write its files"
        hint = "free some room there, the run then goes on by itself; dropforge gc --dry-run says what it can give back"
        code = returncode
    elif returncode == -ENDED_BY:
        message = (
            f"step {spec.step} was ended: the tokenizer or the chat template of {spec.config.base_model} took more "
            f"than {SECONDS:g} s of the processor, to load or for one record"
        )
        hint, code = "mend tokenizer.json and chat_template.jinja there, or use another base model", EXIT_BAD_DATA
    elif returncode < 0:
        message = f"step {spec.step} was killed by {signal_name(-returncode)}"
        hint = "SIGKILL is most often the kernel's answer to memory running out; see its log and the system's"
        code = 128 - returncode
    else:
        message = f"step {spec.step} ended with exit code {returncode} and left no result"
        hint, code = f"the whole story: dropforge logs {spec.run}", returncode or 1
    words = StepError(message=message, hint=hint)
    return StepResult(key=spec.key, fence=spec.fence, status="failed", exit_code=code, error=words)
