"""docs/serving.md: its blocks are run, with the real program where it is there, and its settings are settings."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon.champions.handover.server import Change, Server, check
from daemon.champions.handover.smoke_prompts import SmokePrompt, SmokePrompts
from daemon.settings.load import load
from pipeline.errors import DropforgeError
from tests.chaos.house import Daemon
from tests.daemon.conftest import SCRIPT

ROOT = Path(__file__).parents[4]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
#: What the machine of a test lacks, or what takes too long there.
STAND_INS = ("transformers", "vllm", "llama-server", "python3", "gguf/bin/pip")
CONVERTER = f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'wb').write(b'GGUF')\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def environment(promoted: Daemon, tmp_path: Path) -> dict[str, str]:
    """The variables of a user of that workspace, who has stand-ins for the servers."""
    settings = promoted.folder / "dropforge.toml"
    converter = tmp_path / "stand-ins" / "gguf" / "bin" / "convert-hf-to-gguf"
    settings.write_text(f"{settings.read_text()}[export]\ngguf = ['{converter}']\n")
    stands = tmp_path / "stand-ins"
    (stands / "gguf" / "bin").mkdir(parents=True)
    for name in STAND_INS:
        (stands / name).write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {tmp_path}/called\n')
    converter.write_text(CONVERTER)
    for path in (*stands.glob("*"), *stands.glob("gguf/bin/*")):
        path.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_")}
    return {**kept, "PATH": f"{stands}:{SCRIPT.parent}:{os.environ['PATH']}"}


def run(block: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = block.replace("/opt/gguf", f"{folder}/stand-ins/gguf")
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_block_of_commands_is_run(environment: dict[str, str], tmp_path: Path) -> None:
    for block in blocks("sh"):
        done = run(block, tmp_path, environment)
        if "--gguf" in block:
            # The stand-in makes no model, and the comparison says so; test_export.py has a real one.
            assert "new.gguf could not be compared with the champion" in done.stderr
            done = run(block.splitlines()[-1], tmp_path, environment)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    called = {line.split()[0] for line in (tmp_path / "called").read_text().splitlines()}
    assert called == {"transformers", "vllm", "python3", "pip", "llama-server"}
    assert (tmp_path / "copy" / "model.safetensors").exists()


@pytest.mark.parametrize("block", blocks("toml"))
def test_its_settings_are_settings(tmp_path: Path, block: str) -> None:
    path = tmp_path / "dropforge.toml"
    path.write_text(block)
    settings = load(path, {})
    named = (settings.hooks.after_promotion, settings.hooks.before_training, settings.export.gguf)
    assert any(named)
    if settings.hooks.after_promotion:
        assert settings.hooks.after_promotion[:2] == ("dropforge", "serve-hook")


def test_it_is_short_and_says_what_the_daemon_tells() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
    told = set(re.findall(r"`((?:PROMOTION|TRAINING)_[A-Z_]+)`", TEXT))
    source = (ROOT / "daemon" / "champions" / "hooks" / "changes.py").read_text(encoding="utf-8")
    assert {name for name in told if name.startswith("PROMOTION")} == set(re.findall(r'"(PROMOTION_[A-Z_]+)"', source))


@pytest.mark.long
def test_transformers_serves_the_champion_as_it_says_and_the_hook_knows_it_from_another(
    tmp_path: Path, tiny_llama: Path, tiny: Any
) -> None:
    link = tmp_path / ".dropforge" / "tracks" / "default" / "champion"
    link.parent.mkdir(parents=True)
    link.symlink_to(tiny_llama)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (block,) = (one for one in blocks("sh") if one.startswith("transformers serve"))
    command = block.split("#")[0].replace("8000", str(port)).split()
    argv = [sys.executable, "-m", "transformers.cli.transformers", *command[1:]]
    asked = said_by(tiny_llama, [row["input"] for row in tiny.rows(8, seed=3)])
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log) as process:
        try:
            server = Server(f"http://127.0.0.1:{port}")
            change = Change("default", "f" * 64, is_base=False, adapter="", asked=asked)
            words = check(server, change, 300)
            assert "as the champion did" in words
            other = asked.model_copy(
                update={"prompts": tuple(one.model_copy(update={"answer": "of another"}) for one in asked.prompts)}
            )
            with pytest.raises(DropforgeError, match=r"answered 0 of \d"):
                check(server, Change("default", "f" * 64, is_base=False, adapter="", asked=other), 60)
            with pytest.raises(DropforgeError, match="refused /v1/load_lora_adapter with status 40"):
                server.load_adapter("default-ffffffffffff", str(tiny_llama))
        finally:
            process.terminate()


def said_by(folder: Path, contents: list[str]) -> SmokePrompts:
    """Return what the model in `folder` answers, greedily."""
    import torch  # noqa: PLC0415 - for the long test alone
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = []
    for content in contents:
        chat = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            said = model.generate(**ids, max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        prompts.append(SmokePrompt(content=content, answer=answer, other="of another"))
    return SmokePrompts(model_id="f" * 64, prompts=tuple(prompts), max_tokens=8, repetition_penalty=1.0)
