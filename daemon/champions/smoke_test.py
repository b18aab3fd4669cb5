"""Use a model, its template or the GPU in a child process, as the daemon itself never loads torch."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog

from daemon.settings.model import Settings
from daemon.system.processes import child_environment, kill_group
from daemon.system.threads import thread_variables
from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain, DropforgeError

_SECONDS = 900.0
_LOOK_SECONDS = 0.5
log = structlog.get_logger()


class Stopped(Exception):
    """The `stop` event was set before the model had answered."""


def can_try() -> bool:
    """Return whether torch and transformers, which load models, are installed."""
    return all(find_spec(name) is not None for name in ("torch", "transformers"))


def require_answer(folder: Path, seconds: float = _SECONDS, stop: threading.Event | None = None) -> None:
    """
    Load the model in `folder` on the CPU in a child process; raise `DropforgeError` unless its logits are finite.

    On the CPU since a training may use the GPU's memory. If torch or transformers is missing, only a warning is logged.
    Also raises `DropforgeError` after `seconds`, and `Stopped` once `stop` is set.
    """
    if not can_try():
        log.warning("model_not_tried", folder=str(folder), reason="the training stack is not installed here")
        return
    with _started("cpu", subprocess.DEVNULL, "pipeline.models.ask", "--check", str(folder.absolute())) as process:
        output = _answer(process, seconds, stop or threading.Event())
    if output is None:
        message = f"the model in {folder} gave no answer within {seconds:g} s"
        raise DropforgeError(message, "free memory and cores on this machine, then try again")
    if process.returncode != 0:
        message, hint = _words(output, process.returncode)
        raise DropforgeError(f"the model in {folder} does not answer: {message}", hint)


def ask(request: Mapping[str, Any], device: str, module: str = "pipeline.models.ask") -> Iterator[dict[str, Any]]:
    """
    Yield {"text": PART} for each part of a model's answer, then {"tokens": N, "ended": whether the model ended it}.

    `request` has the fields of `pipeline.models.ask.Ask`, or is what another `module` reads, which prints objects of
    its own. A child process loads the model on `device`, and is killed when the generator is closed. Raises
    `DropforgeError` if it fails, or if torch or transformers is missing.
    """
    if not can_try():
        message = "the training stack, which loads models, is not installed here"
        raise DropforgeError(message, "ask where the daemon's worker runs")
    with _started(device, subprocess.PIPE, module) as process:
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        for line in process.stdout:
            part = json.loads(line)
            if "error" in part:
                raise DropforgeError(str(part["error"]), str(part["hint"]))
            yield part
    if process.returncode != 0:
        raise DropforgeError(*_words(b"", process.returncode))


def try_adapter(folder: str, train: TrainConfig) -> dict[str, int]:
    """
    Return what `pipeline.models.adapter`, in a child process, says of training the base in `folder`; no weight is read.

    Its `layers` and `experts` are the fields of `pipeline.models.adapter.Adapted`; nothing is returned without the
    training stack. Raises `CannotTrain` if the training would fail.
    """
    if not can_try():
        return {}
    request = {"folder": str(Path(folder).absolute()), "train": train.model_dump(mode="json")}
    try:
        (found,) = ask(request, "cpu", "pipeline.models.adapter")
    except DropforgeError as error:
        raise CannotTrain(error.message, error.hint) from error
    return found


def shown_records(path: Path, settings: Settings, track: str, most: int) -> list[dict[str, Any]]:
    """
    Return the first `most` records of a file as the models of `track` see them: what `pipeline.records.shown` prints.

    Raises `DropforgeError` without a base model or the training stack, or if the template cannot be used.
    """
    base, train = settings.track(track).base_model, settings.track(track).train
    if not base:
        message = "no base model is set, whose template writes the prompts"
        raise DropforgeError(message, "set base_model in the settings")
    request = {"file": str(path.absolute()), "folder": base, "format": train.format, "window": train.max_length}
    return list(ask({**request, "most": most}, "cpu", "pipeline.records.shown"))


def try_gpu() -> dict[str, Any]:
    """
    Return what `pipeline.models.gpu_check`, in a child process, says of the GPU.

    Raises `DropforgeError` if no training can use the GPU, and after 15 minutes without an answer.
    """
    with _started("cuda", subprocess.DEVNULL, "pipeline.models.gpu_check") as process:
        output = _answer(process, _SECONDS, threading.Event())
    if output is None:
        raise DropforgeError("the GPU gave no answer", "see the kernel's log: dmesg | grep NVRM")
    if process.returncode != 0:
        raise DropforgeError(*_words(output, process.returncode))
    return dict(json.loads(output.splitlines()[-1]))


@contextlib.contextmanager
def _started(device: str, stdin: int, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start one of our modules in a new process group; kill the group if it still runs at the end of the block."""
    with subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", *argv],
        env=child_environment({"DROPFORGE_DEVICE": device, **thread_variables()}),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_group(process.pid, signal.SIGKILL)


def _answer(process: subprocess.Popen[bytes], seconds: float, stop: threading.Event) -> bytes | None:
    """Return the process's output; `None` if it does not end within `seconds`. Raises `Stopped` if `stop` is set."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if stop.is_set():
            raise Stopped
        try:
            return process.communicate(timeout=min(_LOOK_SECONDS, seconds))[0]
        except subprocess.TimeoutExpired:
            continue
    return None


def _words(output: bytes, code: int) -> tuple[str, str]:
    """Return message and hint of a failed check: from its last line if that is JSON, else from its exit code."""
    try:
        answer = json.loads(output.splitlines()[-1])
        return str(answer["error"]), str(answer["hint"])
    except (IndexError, ValueError, KeyError, TypeError):
        return f"its process ended with {code}", "memory may have run out; see the kernel's log, then try again"
