"""The real vLLM beside transformers on SmolLM2: `VLLM_PROGRAM=/opt/vllm/bin/vllm make prove`."""

import os
from pathlib import Path

import pytest

from daemon.cli.demo.command import demo_base
from daemon.cli.demo.data import make_data
from pipeline.evaluation.engines.in_step import InStep
from pipeline.evaluation.engines.vllm import Vllm
from pipeline.evaluation.engines.vllm_server import Served, Server, read_version
from pipeline.prompt import completion_ids, fold, prompt_ids
from pipeline.qlora import generation
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import load_tokenizer

RECORDS = 24
#: Two engines round bf16 in their own ways: nats a token, of one record and of all.
OF_ONE, OF_ALL = 0.25, 0.02


def test_vllm_answers_and_weighs_as_transformers_does(tmp_path: Path) -> None:
    program = os.environ.get("VLLM_PROGRAM")
    if not program:
        pytest.fail("VLLM_PROGRAM does not name the program vllm: pipeline/evaluation/README.md says how to install it")
    base = demo_base()
    tokenizer = load_tokenizer(base)
    ends = generation.end_tokens(base, tokenizer)
    asked = [
        (fold(row["instruction"], row["input"]), row["output"])
        for row in make_data(heldout=RECORDS, first=1, second=1).heldout
    ]
    prompts = [prompt_ids(tokenizer, "chat", content) for content, _ in asked]
    completions = [completion_ids(tokenizer, "chat", content, output, ends) for content, output in asked]
    pairs = list(zip(prompts, completions, strict=True))
    decoding = Decoding(max_new_tokens=8, repetition_penalty=1.0, batch_size=16)
    served = Served(base, "smollm2", longest=1024, together=16)
    server = Server(program, served, tmp_path / "vllm")
    try:
        server.wait(lambda: None)
        engine = Vllm(server, tokenizer, ends, 16, lambda: None)
        said, weighed = engine.answers(prompts, decoding, lambda *_: None, ()), engine.likelihoods(pairs)
    finally:
        server.stop()
    other = InStep(generation.open_model(base, tokenizer, "cpu"))
    told, likely = other.answers(prompts, decoding, lambda *_: None, ()), other.likelihoods(pairs)
    same = sum(one.text == two.text for one, two in zip(said, told, strict=True))
    apart = [abs(one.nll - two.nll) / one.tokens for one, two in zip(weighed, likely, strict=True)]
    sums = sum(one.nll for one in weighed), sum(one.nll for one in likely)
    print(
        f"vLLM {read_version(program)}: {same} of {RECORDS} answers alike; at most {max(apart):.3f} nats a token apart"
    )
    print(f"all references together: {sums[0]:.2f} and {sums[1]:.2f} nats")
    assert [one.tokens for one in weighed] == [one.tokens for one in likely]
    assert same >= RECORDS * 5 // 6
    assert max(apart) < OF_ONE
    assert abs(sums[0] - sums[1]) / sums[1] < OF_ALL
