"""Answers and likelihoods of SmolLM2 on a GPU are those of a CPU, but for rounding."""

from pathlib import Path
from typing import Any

import pytest

from daemon.cli.demo.command import demo_base
from daemon.cli.demo.data import make_data
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Answer, Decoding, Likelihood
from pipeline.models.loading import Device, load_tokenizer
from pipeline.models.prompt import completion_ids, fold, prompt_ids

RECORDS = 64
#: Nats per token between bfloat16 on two devices, over all records.
APART = 0.02


def said(base: Path, tokenizer: Any, device: Device) -> tuple[list[Answer], list[Likelihood]]:
    ends = generation.end_tokens(base, tokenizer)
    rows = [
        (fold(row["instruction"], row["input"]), row["output"])
        for row in make_data(heldout=RECORDS, first=1, second=1).heldout
    ]
    prompts = [prompt_ids(tokenizer, "chat", content) for content, _ in rows]
    completions = [completion_ids(tokenizer, "chat", content, output, ends) for content, output in rows]
    model = generation.open_model(base, tokenizer, device)
    try:
        decoding = Decoding(max_new_tokens=16, repetition_penalty=1.0, batch_size=16)
        answers = greedy_decoding.answers(model, prompts, decoding, lambda *_: None, ())
        return answers, generation.likelihoods(model, list(zip(prompts, completions, strict=True)))
    finally:
        generation.close_model(model)


def test_answers_and_likelihoods_are_those_of_a_cpu() -> None:
    base = demo_base()
    tokenizer = load_tokenizer(base)
    (on_card, weighed), (on_cpu, expected) = said(base, tokenizer, "cuda"), said(base, tokenizer, "cpu")
    begun = sum(one.text[:1] == other.text[:1] for one, other in zip(on_card, on_cpu, strict=True))
    # Later tokens follow from the first, which two devices may round otherwise.
    assert begun >= RECORDS * 5 // 6
    assert [one.tokens for one in weighed] == [one.tokens for one in expected]
    tokens = sum(one.tokens for one in expected)
    assert sum(one.nll for one in weighed) / tokens == pytest.approx(
        sum(one.nll for one in expected) / tokens, abs=APART
    )
