"""Answers and likelihoods of SmolLM2 on a GPU are those of a CPU, but for rounding."""

from pathlib import Path

import pytest

from daemon.cli.demo import demo_base
from pipeline.models import generation, greedy_decoding
from pipeline.models.generation import Answer, Decoding, Likelihood
from pipeline.models.loading import Device
from pipeline.models.template import fold, single_turn
from tests.demo_data import make_data

RECORDS = 64
#: Nats per token between bfloat16 on two devices, over all records.
APART = 0.02


def said(base: Path, device: Device) -> tuple[list[Answer], list[Likelihood]]:
    template = generation.load_template(base, "chat")
    rows = [
        single_turn(fold(row["instruction"], row["input"]), row["output"])
        for row in make_data(heldout=RECORDS, first=1, second=1).heldout
    ]
    prompts = [template.prompt(turns[:-1]) for turns in rows]
    completions = [template.target(turns) for turns in rows]
    model = generation.open_model(base, template, device)
    try:
        decoding = Decoding(max_new_tokens=16, repetition_penalty=1.0, batch_size=16)
        answers = greedy_decoding.answers(model, prompts, decoding, lambda *_: None, ())
        return answers, generation.likelihoods(model, list(zip(prompts, completions, strict=True)))
    finally:
        generation.close_model(model)


def test_answers_and_likelihoods_are_those_of_a_cpu() -> None:
    base = demo_base()
    (on_card, weighed), (on_cpu, expected) = said(base, "cuda"), said(base, "cpu")
    begun = sum(one.text[:1] == other.text[:1] for one, other in zip(on_card, on_cpu, strict=True))
    # Later tokens follow from the first, which two devices may round otherwise.
    assert begun >= RECORDS * 5 // 6
    assert [one.tokens for one in weighed] == [one.tokens for one in expected]
    tokens = sum(one.tokens for one in expected)
    assert sum(one.nll for one in weighed) / tokens == pytest.approx(
        sum(one.nll for one in expected) / tokens, abs=APART
    )
