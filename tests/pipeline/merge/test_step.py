"""Merging: the folder that comes out, and that it answers as it was trained to."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import durable
from pipeline.artifacts import Adapter, Dataset, Model, ModelRef
from pipeline.config import EvaluateConfig, RunConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted, StepFailed
from pipeline.merge.step import merge
from pipeline.models.generation import load_template
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.manifest import MANIFEST_NAME, model_files, model_id, verify_manifest
from pipeline.models.template import ALPACA_TEMPLATE, fold, single_turn
from tests.made_adapters import save_adapter
from tests.made_artifacts import made_adapter, made_spec, run_config
from tests.prepared_rows import write_rows

#: A further template, as some models have.
TOOLS = "additional_chat_templates/tool_use.jinja"


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
    """Make an adapter of random numbers, as if it was trained on rows: line(base, rows, fmt)."""
    numbers = count(1)

    def make(base: Path, rows: Sequence[dict[str, str]], fmt: str = "chat") -> Line:
        folder = save_adapter(base, tmp_path / f"adapter-{next(numbers)}", target_modules="all-linear")
        config = run_config(base, evaluate=EvaluateConfig(repetition_penalty=1.1))
        adapter = made_adapter(
            made_spec(tmp_path, "train", config),
            folder=folder.name,
            adapter_sha256=durable.sha256_file(folder / "adapter_model.safetensors"),
            base_model_id=config.base_model_id,
            format=fmt,
        )
        return Line(make_attempt, config, write_rows(tmp_path, rows, longest=12), adapter)

    return make


_OUTSIDE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
contents, *folders = json.loads(sys.argv[1])
for folder in folders:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [[{"role": "user", "content": content}] for content in contents]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in asked]
    inputs = tokenizer.apply_chat_template(asked[0], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12)
    print(json.dumps({"prompts": prompts, "config": model.generation_config.to_diff_dict(),
                      "class": type(model).__name__, "length": answer.shape[1] - inputs["input_ids"].shape[1]}))
"""


def test_from_outside_the_folder_is_a_plain_model_whose_template_gives_the_trained_prompt(
    line: Any, tiny: Any, tiny_llama: Path, tiny_llama_alpaca: Path, tmp_path: Path
) -> None:
    rows = tiny.rows(9, seed=5)
    trained: Any = [(tiny_llama, "chat"), (tiny_llama, "alpaca"), (tiny_llama_alpaca, "alpaca")]
    merged = [line(base, rows, fmt).merge() for base, fmt in trained]
    contents = [fold(row["instruction"], row["input"]) for row in rows] + ["no input", "two\nlines ", "{{ x }}"]
    given = json.dumps([contents, *(str(folder) for _, folder in merged)])
    argv = [sys.executable, "-P", "-c", _OUTSIDE, given]
    done = subprocess.run(argv, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (base, fmt), (model, _), told in zip(trained, merged, done.stdout.splitlines(), strict=True):
        seen, template = json.loads(told), load_template(base, fmt)
        assert seen["prompts"] == [template.prompt(single_turn(content)) for content in contents]
        assert (model.format, seen["class"]) == (fmt, "LlamaForCausalLM")
        assert 0 < seen["length"] <= 12
        config = seen["config"]
        assert "max_new_tokens" not in config, "vLLM would limit every answer to it"
        assert config["repetition_penalty"] == 1.1
        assert config.get("do_sample", False) is False
        assert config["eos_token_id"] in (template.tokenizer.eos_token_id, [template.tokenizer.eos_token_id])
        assert config["pad_token_id"] == template.tokenizer.pad_token_id


def test_the_folder_has_a_manifest_and_the_ids_of_its_rows_and_nothing_that_does_not_belong(
    line: Any, tiny: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / TOOLS).parent.mkdir()
    (base / TOOLS).write_text("{{ tools }}")
    ready = line(base, tiny.rows(11, seed=5))
    model, folder = ready.merge()
    assert verify_manifest(folder) == model.model_id == model_id(folder)
    assert (folder / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {path.relative_to(base).as_posix() for path in model_files(base)}
    assert found.keys() == files | {MANIFEST_NAME, "trained-ids.txt"}
    assert model.size_bytes == sum(path.stat().st_size for path in found.values())
    assert {oct(path.stat().st_mode & 0o444) for path in folder.iterdir()} == {"0o444"}
    assert model.model_id != model.base_model_id
    assert ready.merge()[0].model_id == model.model_id, "merging is repeatable"
    path = folder / "trained-ids.txt"
    assert path.read_text().splitlines() == sorted(map(str, range(11)))
    path.write_text("1\n")
    assert model_id(folder) == model.model_id, "what it was trained on is no part of its identity"
    with pytest.raises(DropforgeError, match=r"trained-ids\.txt has"):
        verify_manifest(folder)


def test_a_changed_adapter_or_a_stop_ends_the_step(line: Any, tiny: Any, tiny_llama: Path) -> None:
    ready = line(tiny_llama, tiny.rows(11, seed=5))
    with pytest.raises(StepFailed, match="is missing or has changed since the training"):
        merge(ready.attempt(adapter_sha256="0" * 64))
    stopped = ready.attempt()
    stopped.stop.set()
    with pytest.raises(Interrupted):
        merge(stopped)
    assert not (stopped.folder / "model").exists()


def as_transformers_4_saves_it(base: Path) -> None:
    """Rewrite the tiny base: old names in config.json, the template inside tokenizer_config.json, no padding token."""
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config |= {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None, "chat_template": template}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1))
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (base / "generation_config.json").write_text('{"temperature": 0.6, "max_new_tokens": 5}')


@pytest.mark.parametrize("fmt", ["chat", "alpaca"])
def test_config_and_tokenizer_are_the_bases_files_to_the_byte(
    line: Any, tiny: Any, tiny_llama: Path, tmp_path: Path, fmt: str
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    as_transformers_4_saves_it(base)
    if fmt == "alpaca":
        (base / TOOLS).parent.mkdir()
        (base / TOOLS).write_text("{{ tools }}")
    for name in ("tokenizer_code.py", "tokenizer.bin", "README.md"):
        (base / name).write_text("not for the champion")
    _, folder = line(base, tiny.rows(9, seed=5), fmt).merge()
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    made = {MANIFEST_NAME, "generation_config.json", "model.safetensors", "trained-ids.txt"}
    config: Any = load_model(folder, "cpu").config
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["rope_type"]) == (500000.0, "llama3")
    tokenizer: Any = load_tokenizer(folder)
    assert tokenizer.pad_token is None
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {*generation} - {"transformers_version"} == {"do_sample", "repetition_penalty", "eos_token_id"}
    if fmt == "alpaca":
        # llama.cpp's converter takes the template in tokenizer_config.json before that in the file beside it.
        made |= {"chat_template.jinja", "tokenizer_config.json"}
        names.remove("tokenizer_config.json")
        found, saved = (json.loads((each / "tokenizer_config.json").read_text()) for each in (folder, base))
        assert {**found, "chat_template": saved["chat_template"]} == saved
        assert "chat_template" not in found
        assert tokenizer.chat_template == ALPACA_TEMPLATE
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == names | made
    assert [name for name in names if (folder / name).read_bytes() != (base / name).read_bytes()] == []


def test_a_training_from_a_champion_in_another_format_has_the_bases_template(
    line: Any, tiny: Any, tiny_llama: Path
) -> None:
    ready = line(tiny_llama, tiny.rows(9, seed=5), "alpaca")
    champion, folder = ready.merge()
    assert (folder / "chat_template.jinja").read_text() == ALPACA_TEMPLATE
    start = ModelRef(generation=1, model_id=champion.model_id, path=champion.folder, drops=())
    again = merge(ready.attempt(format="chat", start=start))
    template = (ready.attempt().path(again.folder) / "chat_template.jinja").read_bytes()
    assert template == (tiny_llama / "chat_template.jinja").read_bytes()


_IN_LITTLE_MEMORY = """
import json, re, resource, sys
from pathlib import Path
from pipeline.contract import Attempt, StepSpec
from pipeline.merge.step import merge

warm_up, spec, room = sys.argv[1:]
merge(Attempt(StepSpec.model_validate_json(warm_up)))
now = 1024 * int(re.search(r"VmData:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1))
resource.setrlimit(resource.RLIMIT_DATA, (now + int(room), now + int(room)))
print("limited", flush=True)
print(merge(Attempt(StepSpec.model_validate_json(spec))).model_dump_json())
"""


@pytest.mark.long
def test_a_model_is_merged_in_a_third_of_its_size(line: Any, tiny: Any, tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=12
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    tokenizer: Any = load_tokenizer(tiny_llama)
    tokenizer.save_pretrained(base)
    size = (base / "model.safetensors").stat().st_size
    assert size > 190_000_000
    specs = []
    for model in (tiny_llama, base):
        spec = line(model, tiny.rows(9, seed=5)).attempt().spec
        # The next attempt must not be given this one's adapter.
        own = (tmp_path / spec.inputs["train"]).rename(tmp_path / f"train-of-{model.name}.json")
        specs.append(spec.model_copy(update={"inputs": {**spec.inputs, "train": own.name}}).model_dump_json())
    argv = [sys.executable, "-P", "-c", _IN_LITTLE_MEMORY, *specs, str(size // 3)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.stdout.startswith("limited"), done.stderr
    assert done.returncode == 0, done.stderr
    merged = json.loads(done.stdout.splitlines()[1])
    assert "whole model in memory" not in done.stderr
    assert merged["size_bytes"] > size


def test_a_base_that_was_replaced_since_the_training_is_not_merged_into(line: Any, tiny: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.make_model(base)
    attempt = line(base, tiny.rows(9, seed=5)).attempt()
    shutil.rmtree(base)
    tiny.make_model(base, seed=1)
    with pytest.raises(CannotTrain, match="has changed since the run began"):
        merge(attempt)
