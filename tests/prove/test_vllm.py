"""The real vLLM beside transformers on SmolLM2: `VLLM_PROGRAM=/opt/vllm/bin/vllm make prove`."""

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
from daemon.cli.demo import demo_base
from pipeline.evaluate.inference import InStep, Vllm, cache_bytes
from pipeline.evaluate.vllm import Process, read_version
from pipeline.models import generation
from pipeline.models.generation import Decoding
from pipeline.models.manifest import model_id
from pipeline.models.template import fold, single_turn
from tests.demo_data import make_data
from tests.made_adapters import save_adapter
from tests.prove.box import Box

ROOT = Path(__file__).parents[2]
RECORDS = 24
#: Two engines round bf16 in their own ways: nats per token, of one record and of all.
OF_ONE, OF_ALL = 0.25, 0.02


@pytest.fixture
def program() -> str:
    named = os.environ.get("VLLM_PROGRAM")
    if not named:
        pytest.fail("VLLM_PROGRAM does not name the program vllm: pipeline/evaluate/README.md says how to install it")
    return named


def test_vllm_answers_and_weighs_as_transformers_does(program: str, tmp_path: Path) -> None:
    base = demo_base()
    template = generation.load_template(base, "chat")
    asked = [
        single_turn(fold(row["instruction"], row["input"]), row["output"])
        for row in make_data(heldout=RECORDS, first=1, second=1).heldout
    ]
    prompts = [template.prompt(turns[:-1]) for turns in asked]
    completions = [template.target(turns) for turns in asked]
    pairs = list(zip(prompts, completions, strict=True))
    decoding = Decoding(max_new_tokens=8, repetition_penalty=1.0, batch_size=16)
    arguments = {
        "model": str(base),
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "kv_cache_memory_bytes": cache_bytes(base, 1024, 16),
    }
    engine = Vllm(Process(program, arguments, tmp_path / "vllm.log", lambda: None), template)
    try:
        said, weighed = engine.answers(prompts, decoding, lambda *_: None, ()), engine.likelihoods(pairs)
        again = engine.answers(prompts, decoding, lambda *_: None, ())
    finally:
        engine.close()
    assert again == said, "one process forms the same batches"
    other = InStep(**vars(generation.open_model(base, template, "cpu")))
    told, likely = other.answers(prompts, decoding, lambda *_: None, ()), other.likelihoods(pairs)
    same = sum(one.text == two.text for one, two in zip(said, told, strict=True))
    apart = [abs(one.nll - two.nll) / one.tokens for one, two in zip(weighed, likely, strict=True)]
    sums = sum(one.nll for one in weighed), sum(one.nll for one in likely)
    print(f"vLLM {read_version(program)}: {same} of {RECORDS} alike; up to {max(apart):.3f} nats per token apart")
    print(f"all references together: {sums[0]:.2f} and {sums[1]:.2f} nats")
    assert [one.tokens for one in weighed] == [one.tokens for one in likely]
    assert same >= RECORDS * 5 // 6
    assert max(apart) < OF_ONE
    assert abs(sums[0] - sums[1]) / sums[1] < OF_ALL


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
                seen.append((name, one.content, server.answer(name, single_turn(one.content), asked)))

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
            (name, one.content): server.answer(name, single_turn(one.content), asked)
            for name in names
            for one in asked.prompts
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
    asked = SmokePrompts.model_validate_json((root / path).read_bytes()) if path else None
    adapter = "" if run is None else str(root / str(adapter_of(root, run, model)))
    return handover.Change("default", model, run is None, adapter, asked)


@contextmanager
def serving(program: str, workspace: Path, folder: Path) -> Iterator[handover.Server]:
    """Serve the base as docs/serving.md says, until the context ends."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = (one for one in blocks if "--enable-lora" in one)
    # On a CPU vLLM takes nine tenths of the memory, and ends if anything else is there.
    serve = f"exec {program} serve {demo_base()} --kv-cache-memory-bytes 2G"
    script = block.replace("vllm serve base", serve).replace("/run/vllm", str(folder))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            ["bash", "-c", script],
            cwd=workspace,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield handover.Server(f"unix:{folder}/vllm.sock")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
