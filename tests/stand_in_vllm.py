"""
A stand-in for an environment with vLLM: the program, its Python, and the module `vllm` with what the evaluation uses.

`install` makes one that behaves as a word says: `model` answers with the model itself, `fixed` with the same tokens to
everybody, the others as their names say. What is started leaves its process ids in `pids` in its working folder.
"""

import math
import os
import runpy
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

VERSION = "0.99.1"
#: So many requests are answered before `killed` dies.
LIVES = 14


def install(program: Path, behaviour: str) -> str:
    """Write a program and its Python, which behaves so; return the program's path."""
    program.write_text("#!/bin/sh\n")
    python = program.with_name("python3")
    python.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import stand_in_vllm\nstand_in_vllm.main({behaviour!r}, sys.argv[1:])\n"
    )
    for path in (program, python):
        path.chmod(0o755)
    return str(program)


def main(behaviour: str, argv: list[str]) -> None:
    """Run Python's command line `-I -c CODE` or `-I SCRIPT` with a module `vllm` that behaves so."""
    if argv[1] == "-c":
        metadata.version = lambda _name: VERSION  # type: ignore[assignment]
        if behaviour == "broken":
            sys.exit("PackageNotFoundError: No package metadata was found for vllm")
        exec(argv[2])  # noqa: S102 - as Python does
        return
    worker = subprocess.Popen(["sleep", "600"])
    with Path("pids").open("a") as file:
        file.write(f"{os.getpid()} {worker.pid}\n")
    module: Any = ModuleType("vllm")
    module.LLM = lambda **arguments: StandIn(behaviour, **arguments)
    module.SamplingParams = SimpleNamespace
    sys.modules["vllm"] = module
    runpy.run_path(argv[1], run_name="__main__")


class StandIn:
    """The class `LLM`."""

    def __init__(self, behaviour: str, model: str, **arguments: Any) -> None:
        assert arguments["generation_config"] == "vllm"
        # Without it vLLM takes nine tenths of all memory.
        assert arguments["kv_cache_memory_bytes"] > 0
        # Without a network vLLM finds no address by itself.
        assert (os.environ["VLLM_HOST_IP"], os.environ["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
        print("what vLLM prints is no reply")
        if behaviour == "dies":
            raise ValueError("no room for the cache of keys and values")
        if behaviour == "hangs":
            signal.pause()
        self.behaviour, self.answered = behaviour, 0
        self.complete = of_model(model) if behaviour == "model" else fixed

    def generate(self, prompts: list[Any], sampling: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        if self.behaviour == "silent":
            signal.pause()
        return [
            self.output(prompt["prompt_token_ids"], parameters)
            for prompt, parameters in zip(prompts, sampling, strict=True)
        ]

    def output(self, prompt: list[int], sampling: Any) -> Any:
        assert sampling.temperature == 0
        self.answered += 1
        if self.behaviour == "killed" and self.answered > LIVES:
            os.kill(os.getpid(), signal.SIGKILL)
        tokens, chances = self.complete(prompt, sampling)
        if self.behaviour == "short":
            tokens = tokens[:1]
        if self.behaviour == "no number" and chances:
            chances[-1] = math.nan
        logprobs = chances and [
            None,
            *({token: SimpleNamespace(logprob=chance)} for token, chance in zip(prompt[1:], chances, strict=True)),
        ]
        return SimpleNamespace(
            prompt_token_ids=prompt, prompt_logprobs=logprobs, outputs=[SimpleNamespace(token_ids=tokens)]
        )


def fixed(prompt: list[int], sampling: Any) -> tuple[list[int], list[float] | None]:
    """Return the same answer and likelihoods to everybody."""
    chances = [-1.0] * (len(prompt) - 1) if hasattr(sampling, "prompt_logprobs") else None
    return [5] * sampling.max_tokens, chances


def of_model(folder: str) -> Any:
    """Return what completes with the model in `folder`."""
    import torch  # noqa: PLC0415 - the others start without it
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(folder)

    @torch.inference_mode()
    def complete(tokens: list[int], sampling: Any) -> tuple[list[int], list[float] | None]:
        prompt = torch.tensor([tokens])
        if hasattr(sampling, "prompt_logprobs"):
            chances = torch.log_softmax(model(prompt).logits[0].double(), dim=-1)
            return [5], [float(chances[index, token]) for index, token in enumerate(tokens[1:])]
        said = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=sampling.stop_token_ids,
            pad_token_id=sampling.stop_token_ids[0],
        )
        return said[0, prompt.shape[1] :].tolist(), None

    return complete
