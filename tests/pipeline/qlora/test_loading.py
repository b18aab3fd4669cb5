"""A model that memory does not hold answers from its files as it does from memory."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.prompt import prompt_ids
from pipeline.qlora import generation, greedy_decoding, loading
from pipeline.qlora.generation import Decoding
from pipeline.qlora.loading import load_tokenizer


def told(folder: Path, rows: list[dict[str, str]]) -> tuple[list[str], list[float]]:
    """Return a model's answers to rows, and the likelihood of other ones, and let go of it."""
    tokenizer = load_tokenizer(folder)
    asked = generation.open_model(folder, tokenizer, "cpu")
    prompts = [prompt_ids(tokenizer, "chat", row["input"]) for row in rows]
    answers = greedy_decoding.answers(asked, prompts, Decoding(12, 1.0, 3))
    pairs = [(prompt, tokenizer.encode(row["output"])) for prompt, row in zip(prompts, rows, strict=True)]
    likely = [found.nll for found in generation.likelihoods(asked, pairs)]
    generation.close_model(asked)
    assert {str(weight.device) for weight in asked.model.parameters()} == {"meta"}
    return [answer.text for answer in answers], likely


def test_a_model_larger_than_memory_answers_alike(
    tiny: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.rows(7, seed=3)
    answers, likely = told(tiny_llama, rows)
    assert "read in each pass" not in capfd.readouterr().err
    weights = (tiny_llama / "model.safetensors").stat().st_size
    monkeypatch.setattr(loading, "available_memory", lambda: weights * 11 // 10)
    model: Any = loading.load_model(tiny_llama, "cpu", offload=True)
    assert "disk" in model.hf_device_map.values()
    capfd.readouterr()
    again, as_likely = told(tiny_llama, rows)
    assert again == answers
    assert as_likely == pytest.approx(likely, rel=1e-5)
    assert "read in each pass" in capfd.readouterr().err
    # What is trained or combined is whole.
    assert {str(weight.device) for weight in loading.load_model(tiny_llama, "cpu").parameters()} == {"cpu"}
