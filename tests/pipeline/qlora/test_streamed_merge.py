"""Merging weight by weight: the numbers are PEFT's, no pair is lost, and what cannot stream goes to PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.errors import CannotTrain, StepFailed
from pipeline.qlora import merging, streamed_merge
from pipeline.qlora.loading import load_tokenizer
from pipeline.qlora.merging import Answering, ask, ask_adapted, compare, merge_into
from pipeline.qlora.streamed_merge import CannotStream, open_streamed, write_merged
from tests.made_adapters import save_adapter

#: PEFT warns of much that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PROMPTS = [[5, 9, 30, 44, 7], [8, 3]]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 64}, "layers_to_transform": [1]},
}


def save_base(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = True, shard: str = "5GB") -> Path:
    """Save a random two-layer Llama, with biases in its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return what PEFT makes of the two in float32, its weights then rounded to `dtype`."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True).eval()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in a folder's files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def merge(tmp_path: Path, tiny_llama: Path) -> Callable[..., Path]:
    """Ask and merge as the step does, into a new folder."""

    def make(base: Path, adapter: Path, name: str = "merged", *, streamed: bool = True) -> Path:
        adapted, _ = ask_adapted(base, adapter, PROMPTS)
        assert (adapted.streamed is not None) == streamed, adapted.not_streamed
        merge_into(adapted, load_tokenizer(tiny_llama), tmp_path / name, Answering("alpaca", 8, 1.0, [2]))
        return tmp_path / name

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_logits_are_those_of_peft_in_float32_rounded_once(
    tmp_path: Path, merge: Any, kind: str, dtype: str
) -> None:
    base = save_base(tmp_path / "base", dtype=getattr(torch, dtype))
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    expected = merged_by_peft(base, adapter, getattr(torch, dtype))
    folder = merge(base, adapter)
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert found.dtype == expected.dtype
    assert found.state_dict().keys() == expected.state_dict().keys()
    differing = [name for name, weight in found.state_dict().items() if not weight.equal(expected.state_dict()[name])]
    assert differing == []
    for ours, theirs in zip(ask(found, PROMPTS).logits, ask(expected, PROMPTS).logits, strict=True):
        assert ours.equal(theirs)
    plain = ask(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), PROMPTS).logits
    assert min((a - b).norm() / b.norm() for a, b in zip(ask(found, PROMPTS).logits, plain, strict=True)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_reads_its_weights_while_it_computes_answers_as_one_in_memory(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", tied=kind == "lora")
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    streamed, with_adapter = ask_adapted(base, adapter, PROMPTS)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    whole.eval()
    assert [a.equal(b) for a, b in zip(with_adapter.logits, ask(whole, PROMPTS).logits, strict=True)] == [True, True]
    assert [a.equal(b) for a, b in zip(with_adapter.likeliest, ask(whole, PROMPTS).likeliest, strict=True)] == [
        True
    ] * 2
    assert {parameter.device.type for parameter in streamed.model.parameters()} == {"meta"}, "a weight stayed"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_blocks_give_the_same_weights(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    whole = weights(merge(base, adapter, "whole"))
    monkeypatch.setattr(streamed_merge, "_BLOCK", 100)  # three rows, or one; never a whole weight
    blocks = weights(merge(base, adapter, "blocks"))
    # A product of fewer rows may be summed in another order.
    torch.testing.assert_close(blocks, whole)


def test_shards_are_read_and_written_up_to_a_size(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shard="20KB", tied=False)
    adapter = save_adapter(base, tmp_path / "adapter")
    assert len(list(base.glob("*.safetensors"))) > 3
    (tmp_path / "out").mkdir()
    write_merged(open_streamed(base, adapter), tmp_path / "out", 30_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    for path in files:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
        assert {index["weight_map"][name] for name in tensors} == {path.name}
    (tmp_path / "out/config.json").write_text((base / "config.json").read_text())
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = merged_by_peft(base, adapter).state_dict()
    assert [name for name, weight in found.state_dict().items() if not weight.equal(expected[name])] == []
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())


def test_tied_embeddings_are_written_once(tmp_path: Path, merge: Any) -> None:
    base = save_base(tmp_path / "base")
    folder = merge(base, save_adapter(base, tmp_path / "adapter"))
    assert weights(folder).keys() == weights(base).keys()
    assert "lm_head.weight" not in weights(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_on_a_tied_weight_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(StepFailed, match=r"the adapter changes lm_head, whose weight the model uses in a second place"):
        ask_adapted(base, adapter, PROMPTS)


def test_an_adapter_on_an_untied_head_is_merged(tmp_path: Path, merge: Any) -> None:
    base = save_base(tmp_path / "base", tied=False)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    expected = merged_by_peft(base, adapter).state_dict()
    found = weights(merge(base, adapter))
    assert [name for name, weight in found.items() if not weight.equal(expected[name])] == []


LOST = "base_model.model.model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("lost", ["pair", "half"])
def test_an_adapter_file_without_a_pair_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, *, streamed: bool
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    if not streamed:
        monkeypatch.setattr(merging, "open_streamed", not_this_one)
    path = adapter / "adapter_model.safetensors"
    names = {f"{LOST}.lora_A.weight", f"{LOST}.lora_B.weight"} if lost == "pair" else {f"{LOST}.lora_B.weight"}
    save_file({name: tensor for name, tensor in load_file(path).items() if name not in names}, path)
    with pytest.raises(StepFailed, match=rf"lacks {min(names)}".replace(".", r"\.")):
        ask_adapted(base, adapter, PROMPTS)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_pair_that_meets_no_weight_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, streamed: bool
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    if not streamed:
        monkeypatch.setattr(merging, "open_streamed", not_this_one)
    path = adapter / "adapter_model.safetensors"
    pairs = load_file(path)
    extra = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in pairs.items() if name.startswith(LOST)}
    save_file({**pairs, **{name: tensor.clone() for name, tensor in extra.items()}}, path)
    with pytest.raises(StepFailed, match=r"holds .*layers\.9\.self_attn\.v_proj\.lora_A\.weight"):
        ask_adapted(base, adapter, PROMPTS)


def test_a_pair_that_is_left_unmerged_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    streamed = open_streamed(base, save_adapter(base, tmp_path / "adapter"))
    named = f"{LOST}.weight".removeprefix("base_model.model.")
    shorter = {name: tensor for name, tensor in streamed.base.items() if name != named}
    (tmp_path / "out").mkdir()
    left = streamed_merge.Streamed(streamed.model, streamed.config, shorter, streamed.sources)
    with pytest.raises(StepFailed, match=rf"1 pair of the adapter not merged, that of {named}"):
        write_merged(left, tmp_path / "out", 5_000_000_000)


@pytest.mark.parametrize("broken", [float("nan"), 1e38])
def test_merged_weights_that_are_no_numbers_are_refused(tmp_path: Path, broken: float) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float16)
    adapter = save_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    pairs = load_file(path)
    pairs[f"{LOST}.lora_B.weight"][3, 0] = broken
    save_file(pairs, path)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        CannotTrain, match=r"layers\.1\.self_attn\.v_proj\.weight would hold numbers that are not finite"
    ):
        write_merged(open_streamed(base, adapter), tmp_path / "out", 5_000_000_000)


def not_this_one(*_: Any) -> None:
    """Send a merge to PEFT."""
    raise CannotStream("the test says so")


def doubled_head(base: Path) -> None:
    """Write the tied weight a second time, as some programs do."""
    found = weights(base)
    head = found["model.embed_tokens.weight"].clone()
    save_file({**found, "lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})


def one_in_float32(base: Path) -> None:
    found = weights(base)
    found["model.norm.weight"] = found["model.norm.weight"].float()
    save_file(found, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (doubled_head, {}, "lm_head.weight is not both"),
        (one_in_float32, {}, "its weights are in bfloat16, float32"),
        (None, {"modules_to_save": ["norm"]}, "the adapter's modules_to_save is ['norm']"),
        (None, {"bias": "all"}, "the adapter's bias is 'all'"),
        (None, {"lora_bias": True, "target_modules": ["q_proj"]}, "the adapter's lora_bias is True"),
        (None, {"init_lora_weights": "pissa"}, "the adapter's init_lora_weights is 'pissa'"),
    ],
)
def test_what_cannot_stream_goes_to_peft_and_says_so(
    tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str], change: Any, options: Any, reason: str
) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    if change is not None:
        change(base)
    adapted, expected = ask_adapted(base, adapter, PROMPTS)
    assert reason in adapted.not_streamed
    assert f"merged with the whole model in memory: {adapted.not_streamed}" in capsys.readouterr().err
    drift = compare(merge(base, adapter, streamed=False), PROMPTS, expected, streamed=False)
    assert drift.distance < 0.1


def test_linear_layers_of_gpt2_are_none_and_go_to_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    assert "fan_in_fan_out" in ask_adapted(base, adapter, PROMPTS)[0].not_streamed


def test_an_embedding_with_an_adapter_goes_to_peft(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=False)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert "embed_tokens, which is a Embedding, not linear" in ask_adapted(base, adapter, PROMPTS)[0].not_streamed


def test_the_folder_is_the_one_that_peft_would_have_left(
    tmp_path: Path, merge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    ours = merge(base, adapter, "ours")
    monkeypatch.setattr(merging, "open_streamed", not_this_one)
    theirs = merge(base, adapter, "theirs", streamed=False)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in sorted(ours.glob("*.json")) + sorted(ours.glob("*.jinja")):
        assert path.read_text() == (theirs / path.name).read_text(), path.name
    assert weights(ours).keys() == weights(theirs).keys()
    assert [name for name, weight in weights(ours).items() if not weight.equal(weights(theirs)[name])] == []
