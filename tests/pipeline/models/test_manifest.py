"""A model folder's identity, its manifest, and what a base model must be."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.durable import open_regular
from pipeline.errors import CannotTrain, DropforgeError
from pipeline.models.generation import load_template
from pipeline.models.manifest import (
    MANIFEST_NAME,
    check_base,
    model_files,
    model_id,
    verify_manifest,
    write_manifest,
)
from pipeline.models.safetensors_files import HEADER_BYTES
from tests.model_folder import flip, write_header


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be spoilt."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_the_identity_is_weights_config_tokenizer_generation_config_and_template(folder: Path) -> None:
    (folder / "README.md").write_text("a card")
    (folder / "training_args.bin").write_bytes(b"x")
    assert [path.name for path in model_files(folder)] == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "vocab.txt", "additional_chat_templates/tools.jinja"],
)
def test_a_change_of_any_of_them_changes_the_id(folder: Path, name: str) -> None:
    before = model_id(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    changed = model_id(folder)
    (folder / name).rename(folder / "merges.txt")
    assert len({before, changed, model_id(folder)}) == 3, "content in another file is another model"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "model.safetensors": lambda folder: flip(folder / "model.safetensors"),
    "tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "config.json": lambda folder: (folder / "config.json").write_text("{}"),
    "merges.txt": lambda folder: (folder / "merges.txt").write_text("not listed"),
    MANIFEST_NAME: lambda folder: edit(folder / MANIFEST_NAME, lambda value: {**value, "model_id": "0" * 64}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    write_manifest(folder)
    DAMAGE[name](folder)
    with pytest.raises(DropforgeError, match=name):
        verify_manifest(folder)


def test_a_folder_without_a_readable_manifest_is_not_taken_for_good(folder: Path) -> None:
    with pytest.raises(DropforgeError, match=MANIFEST_NAME):
        verify_manifest(folder)
    for text in ("[", '{"files": {"config.json": 1}}'):
        (folder / MANIFEST_NAME).write_text(text)
        with pytest.raises(DropforgeError, match=MANIFEST_NAME):
            verify_manifest(folder)


def links(folder: Path) -> None:
    """Lay the files out as a download cache does."""
    before = model_id(folder)
    blobs = folder.rename(folder.parent / "blobs")
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    assert model_id(folder) == before


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def set_in(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, lambda config: {**config, **values})


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def device(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to(os.devnull)


def grown(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def index(weight_map: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensors(data: bytes, **entries: tuple[str, object, object]) -> Callable[[Path], None]:
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in entries.items()
    }
    return lambda folder: write_header(folder, header, data)


def mostly_a_hole(folder: Path) -> None:
    size = 1 << 40
    write_header(folder, {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size + size)


def long_headers(folder: Path) -> None:
    """Write two shards whose headers are together longer than all of a model may be, each in a hole."""
    (folder / "model.safetensors").unlink()
    text = json.dumps({"__metadata__": {"a": "b"}}).encode().ljust(HEADER_BYTES * 2 // 3)
    for name in ("model.safetensors", "model-2.safetensors"):
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text)


NO_SIZES = (0, -1, 1 << 40, "420", 4.2, True, [420, 0])
#: Besides those of tests/hostile/test_base_model.py.
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "it is not there": (shutil.rmtree, "no base model folder"),
    "there are no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    "weights are cut off": (cut_off, "model.safetensors that is truncated"),
    "weights are a git-lfs pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid\n"),
        "truncated or not a safetensors",
    ),
    "a shard is missing": (missing_shard, "model-00002-of-00002.safetensors"),
    "its tokenizer is code": (
        set_in("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "auto_map",
    ),
    "it is quantised": (set_in("config.json", quantization_config={"load_in_4bit": True}), "already quantised"),
    "it is an encoder-decoder": (set_in("config.json", is_encoder_decoder=True), "encoder-decoder"),
    "it is an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
    "config.json is broken": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "some other file is a pipe": (pipe("merges.txt"), "holds merges.txt, which is not a regular file"),
    "its weights are a pipe": (pipe("model.safetensors"), "holds model.safetensors, which is not a regular file"),
    "a chat template is a device": (
        device,
        "holds chat_template.jinja, which is not a regular file",
    ),
    "config.json has 10 MB": (grown("config.json", 10_000_000), "config.json of 10,000,000 bytes"),
    "tokenizer.json has a GB": (grown("tokenizer.json", 1 << 30), "tokenizer.json of 1,073,741,824 bytes"),
    "the index is nested": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 200_000),
        "no readable model.safetensors.index.json",
    ),
    "the index names no names": (index({"a": ["b"]}), "no readable model.safetensors.index.json"),
    "the index leads to the root": (index({"a": "/x.safetensors"}), "lacks the shard /x.safetensors"),
    "it names its weights by itself": (set_in("config.json", transformers_weights="x"), "transformers_weights"),
    "its text model is code": (set_in("config.json", text_config={"auto_map": {}}), "auto_map"),
    "its headers are longer than any model's": (long_headers, "and the limit is"),
    "its header is no JSON": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "not JSON",
    ),
    "a shape is negative": (tensors(b"ab", a=("U8", [-1, -2], [0, 2])), "0 of shape of a: .* greater"),
    "a shape has a thousand sides": (tensors(b"a", a=("U8", [1] * 1000, [0, 1])), "shape of a: .* at most 64"),
    "weights are mostly a hole": (mostly_a_hole, "bytes are on disk"),
    "it has more layers than weights": (
        set_in("config.json", num_hidden_layers=4096),
        "num_hidden_layers is 4,096",
    ),
    "there is no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    **{f"vocab_size is {size!r}": (set_in("config.json", vocab_size=size), "vocab_size") for size in NO_SIZES},
    "it has 2^40 layers": (set_in("config.json", num_hidden_layers=1 << 40), "num_hidden_layers"),
    "its heads do not divide": (set_in("config.json", num_key_value_heads=3), "num_attention_heads is"),
    "its window is 2^60 tokens": (set_in("config.json", max_position_embeddings=1 << 60), "max_position_embeddings"),
    "its text model's heads are -24 wide": (set_in("config.json", text_config={"head_dim": -24}), "head_dim"),
    "it has a size of 0 under another name": (set_in("config.json", n_embd=0), "n_embd"),
}


def further_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")


def test_what_is_swapped_for_a_pipe_is_not_waited_for(folder: Path) -> None:
    pipe("config.json")(folder)
    with pytest.raises(OSError, match="no regular file"):
        open_regular(folder / "config.json")
    assert "config.json" not in {path.name for path in model_files(folder)}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_base_is_refused_with_a_remedy_when(folder: Path, reason: str) -> None:
    spoil, word = UNFIT[reason]
    spoil(folder)
    with pytest.raises(CannotTrain, match=word) as raised:
        check_base(folder)
    assert raised.value.hint


def test_further_templates_without_a_default_are_refused_as_the_run_refuses_them_unless_none_is_used(
    folder: Path,
) -> None:
    template = folder / "chat_template.jinja"
    edit(folder / "tokenizer_config.json", lambda value: {**value, "chat_template": template.read_text()})
    template.unlink()
    further_template(folder)
    refusals: tuple[Callable[[Path, Any], object], ...] = (check_base, load_template)
    for refuse in refusals:
        with pytest.raises(CannotTrain):
            refuse(folder, "auto")
        refuse(folder, "alpaca")


FIT: dict[str, Callable[[Path], object]] = {
    "its files are links": links,
    "it has pickled weights, too": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
    "it has further templates": further_template,
    "each layer has a size": set_in("config.json", intermediate_size=[192, 96]),
    "a size is the default": set_in("config.json", head_dim=None),
}


@pytest.mark.parametrize("change", FIT.values(), ids=FIT)
def test_a_base_is_accepted_though(folder: Path, change: Callable[[Path], object]) -> None:
    change(folder)
    check_base(folder)
