"""Models larger than memory, and weight files that are not as their headers say."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CannotTrain
from pipeline.models import generation, greedy_decoding, loading
from pipeline.models.generation import Decoding
from pipeline.models.loading import load_tokenizer
from pipeline.models.manifest import check_base
from pipeline.models.prompt import prompt_ids


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
    # A CPU without 16-bit arithmetic needs the whole model in memory.
    monkeypatch.setattr(generation, "arithmetic_dtype", lambda _: None)
    rows = tiny.rows(7, seed=3)
    answers, likely = told(tiny_llama, rows)
    assert "read in every forward pass" not in capfd.readouterr().err
    weights = (tiny_llama / "model.safetensors").stat().st_size
    monkeypatch.setattr(loading, "available_memory", lambda: weights * 11 // 10)
    model: Any = loading.load_model(tiny_llama, "cpu", spread=True)
    assert "disk" in model.hf_device_map.values()
    capfd.readouterr()
    again, as_likely = told(tiny_llama, rows)
    assert again == answers
    assert as_likely == pytest.approx(likely, rel=1e-5)
    assert "read in every forward pass" in capfd.readouterr().err
    # What is trained or combined is whole.
    assert {str(weight.device) for weight in loading.load_model(tiny_llama, "cpu").parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("dtype", lambda _: "Z8"),
        ("shape", lambda _: [1 << 40]),
        ("data_offsets", lambda offsets: [place - 4 for place in offsets]),
        ("data_offsets", lambda offsets: [place + 4 for place in offsets]),
    ],
    ids=["unknown dtype", "larger than its bytes", "overlap", "gap"],
)
def test_weights_that_only_their_own_reader_tells_to_be_damaged_are_refused_as_they_are_loaded(
    tiny_llama: Path, tmp_path: Path, field: str, change: Any
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    data = (base / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensor = header["model.layers.0.input_layernorm.weight"]
    tensor[field] = change(tensor[field])
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    check_base(base)
    with pytest.raises(CannotTrain, match="cannot be loaded: SafetensorError") as raised:
        loading.load_model(base, "cpu")
    assert raised.value.hint
