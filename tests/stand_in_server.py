"""
A stand-in for a server of models in this process: vLLM's paths, its adapters and what it gets wrong.

A model or adapter is a folder with `answers.json`: what it says to each prompt. A second adapter under a name that is
taken is refused, as by vLLM.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


def write_answers(folder: Path, answers: dict[str, str]) -> Path:
    """Make the folder of a model that answers so."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


class StandIn:
    """Serves `folder` as `base` on a free port until its context ends."""

    def __init__(self, folder: Path, base: str = "base") -> None:
        self.folder = folder
        self.base = base
        self.lock = threading.Lock()
        self.names_loaded: list[str] = []
        self.refused: list[str] = []
        self.restart()
        self.not_up = 0

    def restart(self) -> None:
        """Forget all adapters and read the folder again; not up at the next look."""
        with self.lock:
            self.models = {self.base: _read(self.folder)}
            self.not_up = 1

    def __enter__(self) -> Self:
        stand = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                self.reply(*stand.get(self.path))

            def do_POST(self) -> None:
                self.reply(*stand.post(self.path, self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, status: int, value: Any) -> None:
                body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def get(self, path: str) -> tuple[int, Any]:
        with self.lock:
            if path == "/health":
                self.not_up -= 1
                return (200, {}) if self.not_up < 0 else (503, {})
            if path == "/v1/models":
                parents = {name: None if name == self.base else self.base for name in self.models}
                return 200, {"data": [{"id": name, "parent": parent} for name, parent in parents.items()]}
        return 404, {}

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        if path == "/restart":
            self.restart()
            return 200, {}
        if path == "/v1/chat/completions":
            return self.chat(asked)
        with self.lock:
            name = asked["lora_name"]
            if path == "/v1/load_lora_adapter" and name not in self.models:
                self.models[name] = _read(Path(asked["lora_path"]))
                self.names_loaded.append(name)
            elif path == "/v1/unload_lora_adapter" and name in self.models:
                del self.models[name]
            else:
                return 400, {"error": f"{path} of {name}"}
        return 200, "Success"

    def chat(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name, content = asked["model"], asked["messages"][0]["content"]
        with self.lock:
            if name not in self.models:
                self.refused.append(name)
                return 404, {"error": f"The model `{name}` does not exist."}
            said = self.models[name].get(content, "")
        return 200, {"model": name, "choices": [{"message": {"role": "assistant", "content": said}}]}


def _read(folder: Path) -> dict[str, str]:
    read: dict[str, str] = json.loads((folder / "answers.json").read_text())
    return read
