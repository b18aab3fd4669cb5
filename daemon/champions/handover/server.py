"""An OpenAI-compatible server, as vLLM is one: whether it is up, what it serves, what it answers."""

import contextlib
import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

from daemon.champions.handover.smoke_prompts import SmokePrompts
from pipeline.errors import DropforgeError
from pipeline.http_request import request

_OK = 200
_ANSWER_SECONDS, _LOOK_SECONDS = 120.0, 0.5
_SHOWN = 300
_LORA_METRIC = re.compile(r"^vllm:lora_requests_info\{(?P<labels>[^}]*)\} (?P<at>\d+\.?\d*(?:e\+?\d+)?)", re.MULTILINE)
_ADAPTERS = re.compile(r'(?:running|waiting)_lora_adapters="([^"]*)"')


class Server:
    """A server at http://HOST:PORT or unix:/PATH; what it says is waited for two minutes at most."""

    def __init__(self, url: str) -> None:
        """Speak to the server at `url`. Raises `DropforgeError` if that is no address."""
        self._url = url
        parts = urlsplit(url)
        self._at: str | tuple[str, int] = parts.path if parts.scheme == "unix" else ""
        if parts.scheme == "http" and parts.hostname:
            with contextlib.suppress(ValueError):  # no port
                self._at = (parts.hostname, parts.port or 80)
        if not self._at:
            message = f"{url!r} is no address of a server"
            raise DropforgeError(message, "write http://127.0.0.1:8000, or unix:/run/vllm/vllm.sock")

    def wait(self, seconds: float) -> None:
        """Wait until it is up, for `seconds` at most. Raises `DropforgeError`."""
        end = time.monotonic() + seconds
        while not self._is_up(min(_ANSWER_SECONDS, end - time.monotonic())):
            if time.monotonic() + _LOOK_SECONDS > end:
                message = f"the server at {self._url} was not up within {seconds:g} s"
                raise DropforgeError(message, "see why in its own log; --wait sets the time")
            time.sleep(_LOOK_SECONDS)

    def models(self) -> list[dict[str, Any]]:
        """Return what it serves: each model's `id`, and of an adapter the `parent`. Raises `DropforgeError`."""
        said = self._json("GET", "/v1/models")
        found = said.get("data") if isinstance(said, dict) else None
        models = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        if not models or not all(isinstance(one.get("id"), str) for one in models):
            raise DropforgeError(f"the server at {self._url} names no model", "look at it: curl …/v1/models")
        return models

    def answer(self, model: str, content: str, asked: SmokePrompts) -> str:
        """Return what it answers to a user's message, greedily. Raises `DropforgeError`."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": asked.max_tokens,
        }
        if asked.repetition_penalty != 1:
            body["repetition_penalty"] = asked.repetition_penalty
        said = self._json("POST", "/v1/chat/completions", body)
        try:
            return str(said["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            message = f"the server at {self._url} gave no answer: {str(said)[:_SHOWN]}"
            raise DropforgeError(message, "see its own log") from error

    def load_adapter(self, name: str, folder: str) -> None:
        """Let vLLM load an adapter under a name that it has not had yet. Raises `DropforgeError`."""
        self._text("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_adapter(self, name: str) -> None:
        """Let vLLM forget an adapter. Raises `DropforgeError`."""
        self._text("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def adapters_at_work(self) -> set[str]:
        """Return the adapters that vLLM has requests for, by its newest word on them. Raises `DropforgeError`."""
        found = max(
            _LORA_METRIC.finditer(self._text("GET", "/metrics")), key=lambda one: float(one["at"]), default=None
        )
        lists = [] if found is None else _ADAPTERS.findall(found["labels"])
        return {name.strip() for names in lists for name in names.split(",")} - {""}

    def _is_up(self, seconds: float) -> bool:
        with contextlib.suppress(OSError):
            return request(self._at, "GET", "/health", None, seconds)[0] == _OK
        return False

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        text = self._text(method, path, body)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            message = f"the server at {self._url} answered {path} with no JSON: {text[:_SHOWN]}"
            raise DropforgeError(message, "see whether it is an OpenAI-compatible server, and its own log") from error

    def _text(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        try:
            status, said = request(self._at, method, path, body, _ANSWER_SECONDS)
        except OSError as error:
            message = f"the server at {self._url} does not answer: {str(error) or type(error).__name__}"
            raise DropforgeError(message, "see whether it runs, and its own log") from error
        text = said.decode("utf-8", "replace")
        if status != _OK:
            message = f"the server at {self._url} refused {path} with status {status}: {text[:_SHOWN]}"
            hint = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if "lora" in path else ""
            raise DropforgeError(message, hint or "see its own log")
        return text
