"""
Make a server serve the champion, and check that it answers as the champion did: `dropforge serve-hook`.

Either the server is restarted, and nothing is served meanwhile. Or without a gap, by adapter: the champion's adapter is
loaded under a new name, checked, and only then named in a file that clients read before each request. The former
champion's adapter stays loaded, so that clients which read its name just before are still answered; it is unloaded at
the next change. A name is never used for a second adapter: vLLM keeps cached blocks and requests of the first one under
it.
"""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from daemon.champions.handover.smoke_prompts import SmokePrompts
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.models.template import Turn, conversation
from pipeline.words import count

_OK = 200
_ANSWER_SECONDS, _LOOK_SECONDS = 120.0, 0.2
_MOST_BYTES = 16 << 20
_SHOWN = 300
_ID_LETTERS = 12


@dataclass(frozen=True)
class Change:
    """A change of champion, as the daemon's environment variables describe it to hooks."""

    track: str
    model_id: str
    is_base: bool
    adapter: str
    """Folder of the champion's adapter; empty if it has none over the base model, or if the folder was deleted."""
    asked: SmokePrompts | None
    """Prompts to check the server's answers with; `None` if there are none."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Change":
        """
        Return the change that the variables PROMOTION_* describe, with the smoke prompts from the file that they name.

        Raises `DropforgeError` if PROMOTION_TRACK, PROMOTION_MODEL_ID or PROMOTION_RUN is not set, or the file cannot
        be read or belongs to another model.
        """
        try:
            track, model_id, run = (environment[f"PROMOTION_{name}"] for name in ("TRACK", "MODEL_ID", "RUN"))
        except KeyError as error:
            message = f"{error.args[0]} is not set: serve-hook is run by the daemon, after a change of champion"
            raise DropforgeError(message, "name it in hooks.after_promotion; run that again: dropforge hook") from error
        path = environment.get("PROMOTION_SMOKE_PROMPTS")
        try:
            asked = SmokePrompts.model_validate_json(Path(path).read_bytes()) if path else None
        except (OSError, ValueError) as error:
            message = f"the smoke prompts of track {track} cannot be read: {path}"
            raise DropforgeError(message, f"let the daemon write them again: dropforge hook --track {track}") from error
        if asked is not None and asked.model_id != model_id:
            message = f"another model has become the champion of track {track} meanwhile"
            raise DropforgeError(message, "its own change runs the hook")
        return cls(track, model_id, not run, environment.get("PROMOTION_ADAPTER", ""), asked)

    @property
    def name(self) -> str:
        """Name of the champion's adapter in vLLM: the track, a hyphen and the first 12 characters of the model id."""
        return f"{self.track}-{self.model_id[:_ID_LETTERS]}"


class Server:
    """A client for an OpenAI-compatible server at http://HOST:PORT or unix:/PATH."""

    def __init__(self, url: str) -> None:
        """Use the server at `url`; nothing is sent yet. Raises `DropforgeError` if `url` is not a valid address."""
        self._url = url
        self._at: str | tuple[str, int] = ""
        with contextlib.suppress(ValueError):  # no port, or an open bracket
            parts = urlsplit(url)
            if parts.scheme == "unix":
                self._at = parts.path
            elif parts.scheme == "http" and parts.hostname:
                self._at = (parts.hostname, parts.port or 80)
        if not self._at:
            message = f"{url!r} is no address of a server"
            raise DropforgeError(message, "write http://127.0.0.1:8000, or unix:/run/vllm/vllm.sock")

    def wait(self, seconds: float) -> None:
        """Wait until the server's /health responds with 200. Raises `DropforgeError` after `seconds`."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(OSError):
                if _request(self._at, "GET", "/health", None, min(_ANSWER_SECONDS, left))[0] == _OK:
                    return
            time.sleep(min(_LOOK_SECONDS, left))
        message = f"the server at {self._url} was not up within {seconds:g} s"
        raise DropforgeError(message, "see why in its own log; --wait sets the time")

    def models(self) -> list[dict[str, Any]]:
        """Return the models in /v1/models, with `id` and, for adapters, `parent`. Raises `DropforgeError` if none."""
        answer = self._json("GET", "/v1/models")
        listed = answer.get("data") if isinstance(answer, dict) else None
        models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
        if not models or not all(isinstance(model.get("id"), str) for model in models):
            raise DropforgeError(f"the server at {self._url} names no model", "look at it: curl …/v1/models")
        return models

    def answer(self, model: str, turns: Sequence[Turn], asked: SmokePrompts) -> str:
        """Return the greedy answer of `model`, perhaps "", limited by `asked`. Raises `DropforgeError` if it fails."""
        body: dict[str, Any] = {"model": model, "messages": turns, "temperature": 0, "max_tokens": asked.max_tokens}
        if asked.repetition_penalty != 1:
            body["repetition_penalty"] = asked.repetition_penalty
        answer = self._json("POST", "/v1/chat/completions", body)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            message = f"the server at {self._url} gave no answer: {str(answer)[:_SHOWN]}"
            raise DropforgeError(message, "see its own log") from error

    def load_adapter(self, name: str, folder: str) -> None:
        """Load the adapter in `folder` into vLLM under a new name. Raises `DropforgeError` if that fails."""
        self._text("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_adapter(self, name: str) -> None:
        """Unload the adapter `name` from vLLM. Raises `DropforgeError` if that fails."""
        self._text("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        text = self._text(method, path, body)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            message = f"the server at {self._url} answered {path} with no JSON: {text[:_SHOWN]}"
            raise DropforgeError(message, "see whether it is an OpenAI-compatible server, and its own log") from error

    def _text(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        try:
            status, content = _request(self._at, method, path, body, _ANSWER_SECONDS)
        except OSError as error:
            message = f"the server at {self._url} does not answer: {str(error) or type(error).__name__}"
            raise DropforgeError(message, "see whether it runs, and its own log") from error
        text = content.decode("utf-8", "replace")
        if status != _OK:
            message = f"the server at {self._url} refused {path} with status {status}: {text[:_SHOWN]}"
            hint = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if "lora" in path else ""
            raise DropforgeError(message, hint or "see its own log")
        return text


def restart(server: Server, change: Change, command: Sequence[str], seconds: float) -> str:
    """
    Run the command that restarts the server, wait for the server and check its answers; return a description.

    There is no shell. Raises `DropforgeError` if the command fails or takes longer than `seconds`, the server is not up
    within further `seconds`, or half or more of its answers are not the champion's.
    """
    try:
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, timeout=seconds)  # noqa: S603 - the user's own
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DropforgeError(f"{command[0]} could not restart the server: {error}", "mend --restart") from error
    if done.returncode:
        raise DropforgeError(f"{' '.join(command)} ended with exit code {done.returncode}", "it says why above")
    return check(server, change, seconds)


def check(server: Server, change: Change, seconds: float) -> str:
    """
    Wait until the server is up, send the smoke prompts to the first model that it lists; describe the result.

    If `change` has no prompts, none are sent. Raises `DropforgeError` if the server is not up within `seconds` or does
    not answer, or unless more than half of its answers are the champion's.
    """
    server.wait(seconds)
    return _ask(server, change, str(server.models()[0]["id"]))


def switch_adapter(server: Server, change: Change, name_file: Path, seconds: float) -> str:
    """
    Load the champion's adapter into vLLM, check its answers, write its name into `name_file`; describe the result.

    For a base model nothing is loaded, and the name is that of the server's own model. The track's other adapters are
    unloaded, except the one named in `name_file` so far. Raises `DropforgeError` if the model has no adapter, if vLLM
    refuses to load or unload one, or as `check` does; `name_file` then still names the former champion, and a newly
    loaded adapter is unloaded. Raises `OSError` if `name_file` cannot be read or written.
    """
    server.wait(seconds)
    models = server.models()
    name = change.name
    if change.is_base:
        name = next((str(model["id"]) for model in models if not model.get("parent")), "")
        if not name:
            raise DropforgeError("the server lists adapters and no base model", "start it as docs/serving.md says")
    former = name_file.read_text(encoding="utf-8").strip() if name_file.exists() else ""
    of_track = re.compile(re.escape(change.track) + rf"-[0-9a-f]{{{_ID_LETTERS}}}")
    loaded = {str(model["id"]) for model in models if model.get("parent") and of_track.fullmatch(str(model["id"]))}
    for old in sorted(loaded - {name, former}):
        server.unload_adapter(old)
    is_new = not change.is_base and name not in loaded
    if is_new:
        if not change.adapter:
            message = (
                f"model {change.model_id[:_ID_LETTERS]} has no adapter over the base: its method makes none "
                '(train.method), it was trained over a former champion (train.start = "champion"), or the adapter is '
                "not there any more"
            )
            raise DropforgeError(message, "serve the champion's folder: serve-hook --restart")
        server.load_adapter(name, change.adapter)
    try:
        words = _ask(server, change, name)
    except DropforgeError:
        if is_new:
            server.unload_adapter(name)
        raise
    durable.write_bytes(name_file, f"{name}\n".encode())
    return words


def _ask(server: Server, change: Change, model: str) -> str:
    """Send the smoke prompts; describe the result. Raises `DropforgeError` unless over half of the answers match."""
    if change.asked is None or not change.asked.prompts:
        return f"{model} is served; no recorded answers tell the champion from another model, so it was asked nothing"
    prompts = change.asked.prompts
    right = sum(
        prompt.is_champions(server.answer(model, conversation(prompt.turns, prompt.content), change.asked))
        for prompt in prompts
    )
    words = f"{model} answered {right} of {count(len(prompts), 'smoke prompt')} as the champion did"
    # The other model would be right in none; of the champion's own engines round one or two apart.
    if 2 * right <= len(prompts):
        message = f"{words}; it serves another model, or asks it in another way"
        raise DropforgeError(
            message, "see the folder, chat template and sampling settings that the server started with"
        )
    return words


def _request(
    server: str | tuple[str, int], method: str, path: str, body: object | None, seconds: float
) -> tuple[int, bytes]:
    """
    Send one request, with `body` as JSON unless it is `None`; return the status and the body of the response.

    `server` is the path of a unix socket, or host and port. Raises `OSError` if it cannot be reached, speaks no HTTP,
    is silent for `seconds`, or sends more than 16 MB. A server that never ends is ended by the time limit of the hook.
    """
    connection = _UnixConnection(server) if isinstance(server, str) else http.client.HTTPConnection(*server)
    connection.timeout = seconds
    sent = None if body is None else json.dumps(body).encode()
    try:
        with contextlib.closing(connection):
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = reply.read(_MOST_BYTES + 1)
    except http.client.HTTPException as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
    if len(content) > _MOST_BYTES:
        raise ConnectionError(f"its answer has more than {_MOST_BYTES:,} bytes")
    return reply.status, content


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Connect to the unix socket; the socket is closed with the connection."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
