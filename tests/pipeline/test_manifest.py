"""A model folder's identity, its manifest, and what a base model must be."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CannotTrain, DropforgeError
from pipeline.manifest import MANIFEST_NAME, check_base, model_files, model_id, verify_manifest, write_manifest


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
    ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"],
)
def test_a_change_of_any_of_them_changes_the_id(folder: Path, name: str) -> None:
    before = model_id(folder)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert model_id(folder) != before


def test_moving_content_between_names_changes_the_id(folder: Path) -> None:
    (folder / "vocab.txt").write_text("x")
    before = model_id(folder)
    (folder / "vocab.txt").rename(folder / "vocab.json")
    assert model_id(folder) != before


def test_card_and_manifest_do_not_change_the_id(folder: Path) -> None:
    before = model_id(folder)
    (folder / "README.md").write_text("a card")
    assert write_manifest(folder) == before
    assert model_id(folder) == before


def test_an_additional_chat_template_belongs_to_the_model(folder: Path) -> None:
    before = model_id(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert model_id(folder) != before


def test_links_are_followed_as_a_download_cache_lays_them_out(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert model_id(linked) == model_id(folder)
    check_base(linked)


def test_an_untouched_folder_fits_its_manifest(folder: Path) -> None:
    (folder / "README.md").write_text("a card")
    identity = write_manifest(folder)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["model_id"] == identity
    assert manifest["files"]["README.md"]["size"] == 6
    assert verify_manifest(folder) == identity


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


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
    (folder / MANIFEST_NAME).write_text("[")
    with pytest.raises(DropforgeError, match=MANIFEST_NAME):
        verify_manifest(folder)


def test_a_plain_model_folder_is_a_base(folder: Path) -> None:
    check_base(folder)


def test_pickled_weights_beside_safetensors_are_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    check_base(folder)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")


def absurd_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def setting(name: str, key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, lambda config: {**config, key: value})


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "it is not there": (shutil.rmtree, "no base model folder"),
    "weights are pickled": (only_pickles, "pytorch_model.bin"),
    "there are no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    "weights are cut off": (cut_off, "model.safetensors that is cut off"),
    "weights are a git-lfs pointer": (pointer, "cut off or no safetensors"),
    "weights have no header": (absurd_header, "cut off or no safetensors"),
    "a shard is missing": (missing_shard, "model-00002-of-00002.safetensors"),
    "its model is code": (setting("config.json", "auto_map", {"AutoModel": "x.Y"}), "auto_map"),
    "its tokenizer is code": (
        setting("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.Y", None]}),
        "auto_map",
    ),
    "it is quantised": (setting("config.json", "quantization_config", {"load_in_4bit": True}), "quantised already"),
    "it is an encoder-decoder": (setting("config.json", "is_encoder_decoder", True), "encoder-decoder"),  # noqa: FBT003
    "it is an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
    "config.json is broken": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "there is no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_base_is_refused_with_a_remedy_when(folder: Path, reason: str) -> None:
    spoil, word = UNFIT[reason]
    spoil(folder)
    with pytest.raises(CannotTrain, match=word) as raised:
        check_base(folder)
    assert raised.value.hint
