"""
Run vLLM in its own Python environment, whose interpreter runs `vllm_script` for one model.

The process group is killed by `Process.close`, and by the script itself when the step is killed. The output goes to a
file, whose last lines are part of the error message if vLLM exits.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import CannotTrain, StepFailed

#: To load a model, or to answer one batch.
REPLY_SECONDS = 7200.0
_SCRIPT = str(Path(__file__).with_name("vllm_script.py"))
_VERSION_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_REASON_LINES, _REASON_SIGNS = 4, 800
#: Prefixes of variables that it does not inherit: Python's, keys, and what the steps set for their torch.
_NOT_ITS_OWN = ("PYTHON", "VIRTUAL_ENV", "DROPFORGE_", "VLLM_API_KEY", "TORCHDYNAMO_")
_REMEDY = 'see evaluate.vllm, or set evaluate.vllm = "" to let transformers answer'


def read_version(program: str) -> str:
    """Return vLLM's version by the Python next to `program`. Raises `CannotTrain` if that fails or has no vLLM."""
    code = "from importlib.metadata import version; print(version('vllm'))"
    try:
        done = subprocess.run(  # noqa: S603 - the Python beside the program that the settings name
            [_python(program), "-I", "-c", code],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_VERSION_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotTrain(f"vLLM's Python cannot be run: {error}", _REMEDY) from error
    if done.returncode:
        raise CannotTrain(f"{program} is not vLLM's: {_last_lines(done.stderr)}", _REMEDY)
    return done.stdout.strip()


class Process:
    """A process in which vLLM has loaded a model."""

    def __init__(self, program: str, arguments: dict[str, Any], log: Path, check_stop: Callable[[], None]) -> None:
        """
        Start the environment of `program` with `arguments` for vLLM's class `LLM`; wait until the model is loaded.

        Its output goes to `log`. `check_stop` is called while waiting, and may raise. Raises `StepFailed` as `ask`
        does. After any error the process is killed.
        """
        self._log, self._check_stop = log, check_stop
        self._socket, its_end = socket.socketpair()
        with log.open("wb") as file, its_end:
            self._process = subprocess.Popen(  # noqa: S603 - an argument list of our own, never a shell
                [_python(program), "-I", _SCRIPT],
                cwd=log.parent,
                env=_environment(),
                stdin=its_end.fileno(),
                stdout=its_end.fileno(),
                stderr=file,
                start_new_session=True,
            )
        try:
            self.ask(arguments)
        except BaseException:
            self.close()
            raise

    def ask(self, request: Any) -> Any:
        """
        Send `request` as JSON and wait for the script's reply; return it.

        `check_stop` is called while waiting, and may raise. Raises `StepFailed` if vLLM exits or takes more than two
        hours.
        """
        end = time.monotonic() + REPLY_SECONDS
        reply = b""
        try:
            self._socket.settimeout(REPLY_SECONDS)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            self._socket.settimeout(_LOOK_SECONDS)
            while not reply.endswith(b"\n"):
                self._check_stop()
                if time.monotonic() > end:
                    raise self._failed(f"gave no answer within {REPLY_SECONDS:g} s")
                # A child of it may have inherited the socket.
                exited = self._process.poll() is not None
                with suppress(TimeoutError):
                    part = self._socket.recv(1 << 20)
                    reply += part
                    exited |= not part
                if exited:
                    raise self._failed("exited")
        except ConnectionError as error:
            raise self._failed("exited") from error
        return json.loads(reply)

    def close(self) -> None:
        """Kill the process with its group, wait for its end, and close the connection."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()

    def _failed(self, how: str) -> StepFailed:
        words = _last_lines(self._log.read_text(encoding="utf-8", errors="replace"))
        return StepFailed(f"vLLM {how}: {words}", f"its log is {self._log}; {_REMEDY}")


def _python(program: str) -> str:
    """Return the path of python3 next to `program`, or next to the file that `program` links to."""
    return str(Path(program).resolve().with_name("python3"))


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS_OWN)}
    inherited |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # The service has no network, in which vLLM would look for a route.
    local = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    # A single process: the same requests always form the same batches.
    return {**local, **inherited, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()][-_REASON_LINES:]
    return " | ".join(lines)[-_REASON_SIGNS:] or "no output"
