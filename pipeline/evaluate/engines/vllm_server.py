"""
vLLM for one model, started and stopped: in an environment of its own, on a unix socket that only this user can reach.

Nothing of it outlives the step, however that ends (`process_guard`). What it says goes into a file beside the socket,
whose last lines are the reason when it ends by itself.
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
#: Of this environment it gets no Python's and no key.
_NOT_ITS_OWN = ("PYTHON", "VIRTUAL_ENV", "DROPFORGE_", "VLLM_API_KEY")
_REMEDY = 'see evaluate.vllm, or set evaluate.vllm = "" to let transformers answer'


@dataclass(frozen=True)
class Served:
    """What is to be served: a model's folder under a name, with room for so many tokens and requests."""

    folder: Path
    name: str
    longest: int
    """Most tokens of a prompt with its answer."""
    together: int
    """Most requests at once."""


def read_version(program: str) -> str:
    """
    Return the version of the vLLM that `program` is.

    By the package that put it into its environment: vLLM itself loads for half a minute before it says the same. A
    program of another kind is asked. Raises `CannotTrain` if it is none or does not say, `StepFailed` if it takes too
    long.
    """
    return _installed_version(Path(program)) or _said_version(program)


def _installed_version(program: Path) -> str:
    """Return the version of the package vllm beside the program that it put there; empty if there is none."""
    if not os.access(program, os.X_OK):
        return ""
    own = program.resolve()
    places = [str(place) for place in own.parent.parent.glob("lib/python3*/site-packages")]
    found = metadata.distributions(name="vllm", path=places)
    return next((one.version for one in found if one.entry_points.select(group="console_scripts", name=own.name)), "")


def _said_version(program: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the program that the settings name
            [program, "--version"], env=_environment(), capture_output=True, text=True, check=False,
            timeout=_VERSION_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        raise CannotTrain(f"vLLM cannot be started: {program}: {error.strerror}", _REMEDY) from error
    except subprocess.TimeoutExpired as error:
        message = f"{program} --version said nothing within {_VERSION_SECONDS:g} s"
        raise StepFailed(message, "look what this machine is busy with, then retry the run") from error
    lines = done.stdout.split("\n")
    version = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if done.returncode or not version:
        raise CannotTrain(f"{program} --version ended with {done.returncode}: {_last_lines(done.stderr)}", _REMEDY)
    if not _VERSION.fullmatch(version):
        raise CannotTrain(f"{program} is not vLLM: asked for its version it said {version[:_REASON_SIGNS]}", _REMEDY)
    return version


class Server:
    """A running vLLM, and the way to it."""

    def __init__(self, program: str, served: Served, place: Path) -> None:
        """Start `program` in the new folder `place`; it is not ready before `wait` says so."""
        place.mkdir()
        self._log = place / _LOG
        self._name = served.name
        # A path below it may be longer than a socket's may be.
        self._place = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._socket = f"/proc/self/fd/{self._place}/{_SOCKET}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - an argument list of our own, never a shell
                [sys.executable, "-I", process_guard.__file__, program, *_arguments(served)],
                cwd=place, env=_environment(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, check_stop: Callable[[], None]) -> None:
        """Wait until it answers; raises `StepFailed` if it ends, takes too long or serves another model."""
        end = time.monotonic() + START_SECONDS
        while not self._is_up():
            check_stop()
            if self._process.poll() is not None:
                raise self._ended("ended before it was ready")
            if time.monotonic() > end:
                message = f"vLLM was not ready within {START_SECONDS:g} s: {self._last_words()}"
                raise StepFailed(message, f"its words are in {self._log}; {_REMEDY}")
            time.sleep(_LOOK_SECONDS)
        names = [model.get("id") for model in self._json("GET", "/v1/models").get("data", [])]
        if names != [self._name]:
            raise StepFailed(f"vLLM serves {names} where {self._name} was asked for", _REMEDY)

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """
        Return the one choice of a completion of token ids, which comes with those of prompt and answer.

        Raises `StepFailed` if there is none, or it is another model's or another prompt's.
        """
        asked = {"model": self._name, "temperature": 0, "return_token_ids": True, **request}
        reply = self._json("POST", "/v1/completions", asked)
        choices = reply.get("choices")
        if reply.get("model") != self._name or not isinstance(choices, list) or len(choices) != 1:
            message = f"vLLM gave {len(choices or ())} answers of {reply.get('model')} where one of {self._name} is due"
            raise StepFailed(message, _REMEDY)
        choice: dict[str, Any] = choices[0]
        if choice.get("prompt_token_ids") != request["prompt"] or not isinstance(choice.get("token_ids"), list):
            message = "vLLM answered another prompt than was asked, or without token ids"
            raise StepFailed(message, f"a vLLM of version 0.11 or later is needed; {_REMEDY}")
        return choice

    def stop(self) -> None:
        """End it with all its processes; a second time does nothing."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._place)

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
            raise StepFailed(message, f"its words are in {self._log}; retry the run") from error
        except (OSError, ValueError) as error:
            raise self._ended(f"answers no more ({type(error).__name__})") from error
        if status != _OK or not isinstance(value, dict):
            message = f"vLLM refused a request with status {status}: {str(value)[:_REASON_SIGNS]}"
            raise StepFailed(message, f"its words are in {self._log}; {_REMEDY}")
        return value

    def _ended(self, how: str) -> StepFailed:
        return StepFailed(f"vLLM {how}: {self._last_words()}", f"its words are in {self._log}; {_REMEDY}")

    def _last_words(self) -> str:
        return _last_lines(self._log.read_text(encoding="utf-8", errors="replace"))


def _arguments(served: Served) -> Sequence[str]:
    """
    Return what vLLM is told: the model's own sampling settings must not leak into a greedy evaluation.

    Without `--enforce-eager` it compiles the model at every start, which costs more than it saves on some hundred short
    answers.
    """
    return (
        "serve", str(served.folder), "--served-model-name", served.name, "--uds", _SOCKET, "--max-model-len",
        str(served.longest), "--max-num-seqs", str(served.together), "--generation-config", "vllm", "--enforce-eager",
    )  # fmt: skip


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS_OWN)}
    return {**own, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()][-_REASON_LINES:]
    return " | ".join(lines)[-_REASON_SIGNS:] or "it said nothing"
