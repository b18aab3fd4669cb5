"""
A stand-in for the program vllm: its version, `serve` on a unix socket, and what the evaluation asks of it.

`install` writes a program that behaves as a word says: `model` answers with the model itself, `fixed` with the same
tokens to everybody, the others as their names say. What is started leaves its numbers in `pids` beside the socket.
"""

import argparse
import json
import math
import os
import signal
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

VERSION = "0.99.1"
#: So many completions are answered before `killed` dies.
LIVES = 14


def install(program: Path, behaviour: str) -> str:
    """Write an executable program that behaves so; return its path."""
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import stand_in_vllm\nsys.exit(stand_in_vllm.main({behaviour!r}, sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    return str(program)


def main(behaviour: str, argv: list[str]) -> int:
    """Do what the command line says, as vllm does."""
    if argv == ["--version"]:
        if behaviour == "broken":
            sys.stderr.write("ImportError: libcudart.so.12: cannot open shared object file\n")
            return 1
        print(f"WARNING of no account\n{VERSION}")
        return 0
    parser = argparse.ArgumentParser()
    for name in ("command", "folder", "--served-model-name", "--uds"):
        parser.add_argument(name)
    asked, _ = parser.parse_known_args(argv)
    # A worker that leaves the session, as an engine's may.
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path("pids").write_text(f"{os.getppid()} {os.getpid()} {worker.pid}")
    if behaviour == "dies":
        print("ValueError: no room for the cache of keys and values", flush=True)
        return 1
    if behaviour == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pause()
    serve(behaviour, asked)
    return 0


def serve(behaviour: str, asked_for: argparse.Namespace) -> None:
    """Answer until the process is ended."""
    name = "another" if behaviour == "another model" else asked_for.served_model_name
    complete = of_model(asked_for.folder) if behaviour == "model" else fixed
    lock, answered = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing: there is no address to say it of."""

        def do_GET(self) -> None:
            models = {"data": [{"id": name}]}
            self.reply(models if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["temperature"] == 0
            if behaviour == "silent":
                signal.pause()
            with lock:
                answered[0] += 1
                if behaviour == "killed" and answered[0] > LIVES:
                    os.kill(os.getpid(), signal.SIGKILL)
                choice = {"prompt_token_ids": asked["prompt"], **complete(asked)}
            self.reply({"model": asked["model"], "choices": [spoilt(behaviour, choice)]})

        def reply(self, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(500 if behaviour == "refuses" and "choices" in value else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    Server(asked_for.uds, Handler).serve_forever()


def spoilt(behaviour: str, choice: dict[str, Any]) -> dict[str, Any]:
    """Return an answer as it must not be."""
    if behaviour == "short" and "prompt_logprobs" not in choice:
        return {**choice, "token_ids": choice["token_ids"][:1]}
    if behaviour == "another prompt":
        return {**choice, "prompt_token_ids": choice["prompt_token_ids"][1:]}
    if behaviour == "fewer likelihoods" and "prompt_logprobs" in choice:
        return {**choice, "prompt_logprobs": choice["prompt_logprobs"][:-1]}
    if behaviour == "no number" and "prompt_logprobs" in choice:
        nothing = [one and {token: {"logprob": math.nan} for token in one} for one in choice["prompt_logprobs"]]
        return {**choice, "prompt_logprobs": nothing}
    return choice


def fixed(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the same answer and likelihoods to everybody."""
    if "prompt_logprobs" in asked:
        return {
            "token_ids": [5],
            "prompt_logprobs": [None, *({str(token): {"logprob": -1.0}} for token in asked["prompt"][1:])],
        }
    return {"token_ids": [5] * asked["max_tokens"]}


def of_model(folder: str) -> Any:
    """Return what completes with the model in `folder`."""
    import torch  # noqa: PLC0415 - the others start without it
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(folder)

    @torch.inference_mode()
    def complete(asked: dict[str, Any]) -> dict[str, Any]:
        prompt = torch.tensor([asked["prompt"]])
        if "prompt_logprobs" in asked:
            chances = torch.log_softmax(model(prompt).logits[0].double(), dim=-1)
            tokens = asked["prompt"][1:]
            given = [{str(token): {"logprob": float(chances[place, token])}} for place, token in enumerate(tokens)]
            return {"token_ids": [5], "prompt_logprobs": [None, *given]}
        said = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=asked["max_tokens"],
            repetition_penalty=asked["repetition_penalty"],
            eos_token_id=asked["stop_token_ids"],
            pad_token_id=asked["stop_token_ids"][0],
        )
        return {"token_ids": said[0, prompt.shape[1] :].tolist()}

    return complete
