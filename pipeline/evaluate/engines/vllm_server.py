"""
Start and stop a vLLM server for one model, in its own environment, on a unix socket that only this user can reach.

None of its processes outlives the step, however that ends (`process_guard`). Its output goes to a file beside the
socket, whose last lines are part of the error message if it exits.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import CannotTrain, StepFailed
from pipeline.evaluate.engines import process_guard
from pipeline.http_request import request as ask

#: Loading a large model, and compiling it the first time, takes minutes.
START_SECONDS = 1800.0
ANSWER_SECONDS = 1800.0
_VERSION_SECONDS = 300.0
_VERSION = re.compile(r"\d+\.\d+\S*")
_HEALTH_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_STOP_SECONDS = 60.0
_SOCKET, _LOG = "vllm.sock", "vllm.log"
_OK = 200
_REASON_LINES, _REASON_SIGNS = 4, 800
#: Prefixes of variables that it does not inherit: Python's and keys.
_NOT_ITS_OWN = ("PYTHON", "VIRTUAL_ENV", "DROPFORGE_", "VLLM_API_KEY")
_REMEDY = 'see evaluate.vllm, or set evaluate.vllm = "" to let transformers answer'


@dataclass(frozen=True)
class Served:
    """A model to serve: its folder and name, and the most tokens and requests."""

    folder: Path
    name: str
    longest: int
    """Most tokens of a prompt with its answer."""
    together: int
    """Most concurrent requests."""


def read_version(program: str) -> str:
    """
    Return the version of vLLM's program.

    It is read from the package that installed the program, as `--version` takes half a minute; other programs are run
    with `--version`. Raises `CannotTrain` if the program is not vLLM, `StepFailed` if it takes too long.
    """
    return _installed_version(Path(program)) or _said_version(program)


def _installed_version(program: Path) -> str:
    """Return the version of the package vllm that installed the program; empty if there is none."""
    if not os.access(program, os.X_OK):
        return ""
    path = program.resolve()
    folders = [str(folder) for folder in path.parent.parent.glob("lib/python3*/site-packages")]
    packages = metadata.distributions(name="vllm", path=folders)
    own = (item for item in packages if item.entry_points.select(group="console_scripts", name=path.name))
    return next((item.version for item in own), "")


def _said_version(program: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the program that the settings name
            [program, "--version"],
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_VERSION_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise CannotTrain(f"vLLM cannot be started: {program}: {error.strerror}", _REMEDY) from error
    except subprocess.TimeoutExpired as error:
        message = f"{program} --version gave no answer within {_VERSION_SECONDS:g} s"
        raise StepFailed(message, "see what this machine is busy with, then retry the run") from error
    lines = done.stdout.split("\n")
    version = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if done.returncode or not version:
        raise CannotTrain(f"{program} --version exited with {done.returncode}: {_last_lines(done.stderr)}", _REMEDY)
    if not _VERSION.fullmatch(version):
        raise CannotTrain(f"{program} is not vLLM: --version printed {version[:_REASON_SIGNS]}", _REMEDY)
    return version


class Server:
    """A running vLLM server and requests to it."""

    def __init__(self, program: str, served: Served, folder: Path) -> None:
        """Start `program` in the new `folder`; it is ready once `wait` returns."""
        folder.mkdir()
        self._log = folder / _LOG
        self._name = served.name
        # The path may be longer than a socket address allows.
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._socket = f"/proc/self/fd/{self._folder}/{_SOCKET}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - an argument list of our own, never a shell
                [sys.executable, "-I", process_guard.__file__, program, *_arguments(served)],
                cwd=folder,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, check_stop: Callable[[], None]) -> None:
        """Wait until it answers. Raises `StepFailed` if it exits, takes too long or serves another model."""
        end = time.monotonic() + START_SECONDS
        while not self._is_up():
            check_stop()
            if self._process.poll() is not None:
                raise self._ended("exited before it was ready")
            if time.monotonic() > end:
                message = f"vLLM was not ready within {START_SECONDS:g} s: {self._last_words()}"
                raise StepFailed(message, f"its log is {self._log}; {_REMEDY}")
            time.sleep(_LOOK_SECONDS)
        names = [model.get("id") for model in self._json("GET", "/v1/models").get("data", [])]
        if names != [self._name]:
            raise StepFailed(f"vLLM serves {names} instead of {self._name}", _REMEDY)

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """
        Return the choice of a completion request, with the token ids of prompt and answer.

        Raises `StepFailed` if there is not exactly one, or it is of another model or prompt.
        """
        body = {"model": self._name, "temperature": 0, "return_token_ids": True, **request}
        reply = self._json("POST", "/v1/completions", body)
        choices = reply.get("choices")
        if reply.get("model") != self._name or not isinstance(choices, list) or len(choices) != 1:
            message = f"vLLM gave {len(choices or ())} answers of {reply.get('model')} instead of one of {self._name}"
            raise StepFailed(message, _REMEDY)
        choice: dict[str, Any] = choices[0]
        if choice.get("prompt_token_ids") != request["prompt"] or not isinstance(choice.get("token_ids"), list):
            message = "vLLM answered another prompt, or without token ids"
            raise StepFailed(message, f"vLLM 0.11 or later is needed; {_REMEDY}")
        return choice

    def stop(self) -> None:
        """Stop it with all its processes; a second call does nothing."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._folder)

    def _is_up(self) -> bool:
        try:
            return ask(self._socket, "GET", "/health", None, _HEALTH_SECONDS)[0] == _OK
        except OSError:
            return False

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            status, text = ask(self._socket, method, path, body, ANSWER_SECONDS)
            value = json.loads(text)
        except TimeoutError as error:
            message = f"vLLM gave no answer within {ANSWER_SECONDS:g} s: {self._last_words()}"
            raise StepFailed(message, f"its log is {self._log}; retry the run") from error
        except (OSError, ValueError) as error:
            raise self._ended(f"stopped answering ({type(error).__name__})") from error
        if status != _OK or not isinstance(value, dict):
            message = f"vLLM refused a request with status {status}: {str(value)[:_REASON_SIGNS]}"
            raise StepFailed(message, f"its log is {self._log}; {_REMEDY}")
        return value

    def _ended(self, how: str) -> StepFailed:
        return StepFailed(f"vLLM {how}: {self._last_words()}", f"its log is {self._log}; {_REMEDY}")

    def _last_words(self) -> str:
        return _last_lines(self._log.read_text(encoding="utf-8", errors="replace"))


def _arguments(served: Served) -> Sequence[str]:
    """
    Return vLLM's arguments; the model's own sampling settings must not affect a greedy evaluation.

    Without `--enforce-eager` it compiles the model at every start, which costs more than it saves on some hundred short
    answers.
    """
    return (
        "serve",
        str(served.folder),
        "--served-model-name",
        served.name,
        "--uds",
        _SOCKET,
        "--max-model-len",
        str(served.longest),
        "--max-num-seqs",
        str(served.together),
        "--generation-config",
        "vllm",
        "--enforce-eager",
    )


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS_OWN)}
    return {**own, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()][-_REASON_LINES:]
    return " | ".join(lines)[-_REASON_SIGNS:] or "no output"
