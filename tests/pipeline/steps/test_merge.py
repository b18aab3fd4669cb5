"""Merging: the folder that comes out, and that it answers as it was trained to."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Adapter, Dataset, Model
from pipeline.config import EvaluateConfig, RunConfig, TrainConfig
from pipeline.contract import Attempt
from pipeline.dataset.heldout import dataset_hash
from pipeline.errors import CannotTrain, DropforgeError, Interrupted, StepFailed
from pipeline.model_folder.manifest import MANIFEST_NAME, model_id, verify_manifest
from pipeline.model_folder.trained_ids import trained_ids
from pipeline.prompt import fold, prompt_ids
from pipeline.qlora.generation import Decoding, open_model
from pipeline.qlora.greedy_decoding import answers
from pipeline.qlora.loading import load_tokenizer
from pipeline.qlora.merging import tolerance
from pipeline.steps.merge import merge
from pipeline.steps.train import train


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_DEVICE", "cpu")


@dataclass(frozen=True)
class Line:
    """A run up to its adapter, ready to be merged."""

    make_attempt: Callable[..., Attempt]
    config: RunConfig
    dataset: Dataset
    adapter: Adapter

    def attempt(self, **changes: Any) -> Attempt:
        adapter = self.adapter.model_copy(update=changes)
        return self.make_attempt("merge", config=self.config, inputs={"prepare": self.dataset, "train": adapter})

    def merge(self) -> tuple[Model, Path]:
        attempt = self.attempt()
        model = merge(attempt)
        return model, attempt.path(model.folder)


@pytest.fixture
def line(tmp_path: Path, make_attempt: Callable[..., Attempt]) -> Callable[..., Line]:
    """Train an adapter on rows: line(base, rows, **train settings)."""

    def make(base: Path, rows: Sequence[dict[str, str]], **settings: Any) -> Line:
        (tmp_path / "data").mkdir()
        lines = (json.dumps({"id": str(number), **row}) + "\n" for number, row in enumerate(rows))
        (tmp_path / "data" / "train.jsonl").write_text("".join(lines))
        dataset = Dataset(
            folder="data", train_rows=len(rows), dev_rows=0, heldout_rows=0, heldout_groups=0, heldout_pinned=False,
            heldout_version="v",
            dataset_sha256=dataset_hash(tmp_path / "data"), duplicates=0, replaced=0, removed_heldout=0,
            metric="exact_match", max_new_tokens=12,
        )  # fmt: skip
        config = RunConfig(
            track="default", base_model=str(base), base_model_id=model_id(base), salt="s",
            train=TrainConfig(**{"rank": 4, "learning_rate": 3e-3, "quantization": "none", **settings}),
            evaluate=EvaluateConfig(repetition_penalty=1.1),
        )  # fmt: skip
        adapter = train(make_attempt("train", config=config, inputs={"prepare": dataset}))
        return Line(make_attempt, config, dataset, adapter)

    return make


def in_dtype(base: Path, target: Path, name: str) -> Path:
    """Save the base again in another float type."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, name))
    model.save_pretrained(target)
    load_tokenizer(base).save_pretrained(target)
    return target


_OUTSIDE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, contents = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
asked = [[{"role": "user", "content": content}] for content in contents]
prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in asked]
inputs = tokenizer.apply_chat_template(asked[0], add_generation_prompt=True, return_tensors="pt")
answer = model.generate(**inputs)
print(json.dumps({"prompts": prompts, "config": model.generation_config.to_diff_dict(), "class": type(model).__name__,
                  "length": answer.shape[1] - inputs["input_ids"].shape[1]}))
"""


@pytest.mark.parametrize(("fmt", "own_template"), [("chat", True), ("alpaca", True), ("alpaca", False)])
def test_from_outside_the_folder_is_a_plain_model_whose_template_gives_the_trained_prompt(
    line: Any, tiny: Any, tiny_llama: Path, tiny_llama_alpaca: Path, tmp_path: Path, fmt: Any, own_template: bool
) -> None:
    base = tiny_llama if own_template else tiny_llama_alpaca
    rows = tiny.rows(9, seed=5)
    model, folder = line(base, rows, format=fmt).merge()
    contents = [fold(row["instruction"], row["input"]) for row in rows] + ["no input", "two\nlines ", "{{ x }}"]
    argv = [sys.executable, "-P", "-c", _OUTSIDE, str(folder), json.dumps(contents)]
    done = subprocess.run(argv, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    trained_with: Any = load_tokenizer(base)
    assert seen["prompts"] == [prompt_ids(trained_with, fmt, content) for content in contents]
    assert model.format == fmt
    assert seen["class"] == "LlamaForCausalLM"
    assert 0 < seen["length"] <= 12
    config = seen["config"]
    assert (config["max_new_tokens"], config["repetition_penalty"]) == (12, 1.1)
    assert config.get("do_sample", False) is False
    assert config["eos_token_id"] in (trained_with.eos_token_id, [trained_with.eos_token_id])
    assert config["pad_token_id"] == trained_with.pad_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_keeps_its_dtype_and_the_merged_model_answers_as_the_adapter(
    line: Any, tiny: Any, tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    base = in_dtype(tiny_llama, tmp_path / "base", dtype)
    rows = tiny.rows(40, seed=5)
    model, folder = line(base, rows, quantization="nf4", epochs=4).merge()
    merged, plain = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert {str(tensor.dtype) for tensor in merged.values()} == {f"torch.{dtype}"}
    assert model.dtype == dtype
    assert model.logits_difference <= model.logits_tolerance
    assert merged.keys() == plain.keys()
    changed = {name.split(".")[-2] for name in merged if not merged[name].equal(plain[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_stronger_adapter_may_be_rounded_more_but_none_may_lose_half_of_its_logits() -> None:
    adapted = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])]

    def allowed(moved: float, dtype: str = "bfloat16") -> float:
        # The second prompt is moved twice as far: the one that is moved least counts.
        base = [logits * (1 + moved * far) for logits, far in zip(adapted, (1, 2), strict=True)]
        return tolerance(dtype, base, adapted)

    assert [allowed(moved) for moved in (0.0, 0.5, 1.0)] == pytest.approx([0.25] * 3)
    assert [allowed(moved) for moved in (1.5, 2.0)] == pytest.approx([0.375, 0.5])
    assert [allowed(moved) for moved in (2.1, 9.6, 32.0, 1e6)] == pytest.approx([0.5] * 4)
    assert (allowed(4.0, "float16"), allowed(4.0, "float32")) == pytest.approx((0.1, 0.002))
    assert (allowed(32.0, "float16"), allowed(32.0, "float32")) == pytest.approx((0.1, 0.002))


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("whose", ["base", "adapted"])
@pytest.mark.parametrize("prompt", [0, 1])
def test_logits_that_are_no_measure_excuse_nothing(broken: float, whose: str, prompt: int) -> None:
    logits = {name: [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])] for name in ("base", "adapted")}
    logits[whose][prompt] = torch.full((2,), broken)
    if (whose, broken) == ("base", 0.0):
        assert tolerance("bfloat16", **logits) == 0.25, "a base that says nothing is moved by as much as is there"
        return
    with pytest.raises(StepFailed, match="not finite, or all zero"):
        tolerance("bfloat16", **logits)


def test_the_folder_has_a_manifest_and_nothing_that_does_not_belong(line: Any, tiny: Any, tiny_llama: Path) -> None:
    model, folder = line(tiny_llama, tiny.rows(9, seed=5)).merge()
    assert verify_manifest(folder) == model.model_id == model_id(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            "chat_template.jinja", "config.json", MANIFEST_NAME, "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json", "trained-ids.txt",
        ]
    )  # fmt: skip
    assert model.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert {oct(path.stat().st_mode & 0o444) for path in folder.iterdir()} == {"0o444"}
    assert model.model_id != model.base_model_id


def test_the_folder_says_what_was_trained_on_beside_its_identity(line: Any, tiny: Any, tiny_llama: Path) -> None:
    model, folder = line(tiny_llama, tiny.rows(11, seed=5)).merge()
    assert trained_ids(folder) == {str(number) for number in range(11)}
    path = folder / "trained-ids.txt"
    assert path.read_text().splitlines() == sorted(map(str, range(11)))
    path.write_text("1\n")
    assert model_id(folder) == model.model_id
    with pytest.raises(DropforgeError, match=r"trained-ids\.txt has"):
        verify_manifest(folder)


def test_merging_twice_gives_the_same_model(line: Any, tiny: Any, tiny_llama: Path) -> None:
    ready = line(tiny_llama, tiny.rows(9, seed=5))
    assert ready.merge()[0].model_id == ready.merge()[0].model_id


def test_a_tokenizer_without_padding_gets_its_eos_for_it(
    line: Any, tiny: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    _, folder = line(base, tiny.rows(9, seed=5)).merge()
    tokenizer: Any = load_tokenizer(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"  # noqa: S105 - a token of text


def test_a_merged_model_that_answers_otherwise_is_refused(
    line: Any, tiny: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.5 * delta(self, name))
    ready = line(tiny_llama, tiny.rows(40, seed=5), epochs=4)
    with pytest.raises(StepFailed, match="logits are"):
        ready.merge()


def test_an_adapter_that_is_not_the_trained_one_is_refused(line: Any, tiny: Any, tiny_llama: Path) -> None:
    attempt = line(tiny_llama, tiny.rows(9, seed=5)).attempt(adapter_sha256="0" * 64)
    with pytest.raises(StepFailed, match="not the one that was trained"):
        merge(attempt)


def test_a_base_that_was_replaced_since_the_training_is_not_merged_into(line: Any, tiny: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.make_model(base)
    attempt = line(base, tiny.rows(9, seed=5)).attempt()
    shutil.rmtree(base)
    tiny.make_model(base, seed=1)
    with pytest.raises(CannotTrain, match="not the one that the adapter was trained on"):
        merge(attempt)


def test_a_merge_that_is_asked_to_stop_stops(line: Any, tiny: Any, tiny_llama: Path) -> None:
    attempt = line(tiny_llama, tiny.rows(9, seed=5)).attempt()
    attempt.stop.set()
    with pytest.raises(Interrupted):
        merge(attempt)
    assert not (attempt.folder / "model").exists()


def test_the_tiny_model_learns_its_task_in_nf4_and_the_merged_folder_knows_it(
    line: Any, tiny: Any, tiny_llama: Path
) -> None:
    made = tiny.rows(300, seed=1)
    _, folder = line(tiny_llama, made[:240], **tiny.settings()).merge()

    def right(model: Path) -> float:
        tokenizer: Any = load_tokenizer(model)
        asked = open_model(model, tokenizer, "cpu")
        contents = [fold(row["instruction"], row["input"]) for row in made[240:]]
        prompts = [prompt_ids(tokenizer, "chat", content) for content in contents]
        said = answers(asked, prompts, Decoding(8, 1.0, 60))
        hits: int = sum(answer.text == row["output"] for answer, row in zip(said, made[240:], strict=True))
        return hits / len(prompts)

    assert right(tiny_llama) == 0
    assert right(folder) >= 0.8
