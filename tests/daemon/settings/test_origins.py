"""Each setting says where it comes from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.settings.origins import Origin, origins
from daemon.settings.schema import settings_schema
from tests.model_folder import write_model

FILE = """\
# A file with a bit of everything.
base_model = "base"

[train]
preset = "quality"
rank = 8  # a comment

[hooks]
after_promotion = [
    "sh",  # [train]
    "reload",
]

[tracks.support]
train.rank = 4
judge = { records = 5 }
"""


def by_name(path: Path, environment: dict[str, str] | None = None) -> dict[str, Origin]:
    return {one.name: one for one in origins(path, environment or {})}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dropforge.toml"
    path.write_text(FILE)
    return path


def test_each_value_says_where_it_comes_from(file: Path) -> None:
    found = by_name(file, {"DROPFORGE_TRAIN__EPOCHS": "2", "DROPFORGE_GATE": '{"on": "pinned"}'})
    told = {name: (one.value, one.source, one.where) for name, one in found.items()}
    assert told["base_model"] == (str(file.parent / "base"), "file", str(file))
    assert told["train.rank"] == (8, "file", str(file))
    assert told["train.epochs"] == (2, "environment", "DROPFORGE_TRAIN__EPOCHS")
    assert told["gate.on"] == ("pinned", "environment", "DROPFORGE_GATE")
    assert told["train.alpha"] == (32, "default", "")
    assert told["hooks.after_promotion"] == (["sh", "reload"], "file", str(file))
    assert told["tracks.support.train.rank"] == (4, "file", str(file))
    assert told["tracks.support.judge.records"] == (5, "file", str(file))


def test_a_preset_is_named_where_it_says_the_value(file: Path) -> None:
    assert by_name(file)["train.epochs"] == Origin(
        name="train.epochs", value=3.0, source="preset", where="train.preset = quality"
    )


def test_every_setting_of_the_schema_is_there_once_and_without_a_file_all_are_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = origins(None, {})
    schema = settings_schema()

    def names(fields: dict[str, Any], place: str = "") -> Iterator[str]:
        for name, field in fields.items():
            if "$ref" in field:
                yield from names(schema["$defs"][field["$ref"].split("/")[-1]]["properties"], f"{place}{name}.")
            else:
                yield place + name

    assert sorted(one.name for one in found) == sorted(set(names(schema["properties"])) - {"tracks"})
    assert {one.source for one in found} == {"default"}


def test_config_show_and_check(file: Path, dropforge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_TRAIN__EPOCHS", "2")
    ended = dropforge("config", "show", "train.epochs", "--json")
    assert ended.json["settings"] == [
        {"name": "train.epochs", "value": 2, "source": "environment", "where": "DROPFORGE_TRAIN__EPOCHS"}
    ]
    ended = dropforge("config", "show", "train")
    assert ended.code == 0
    assert "train.rank" in ended.out
    assert "base_model" not in ended.out
    assert dropforge("config").out == dropforge("config", "show").out
    ended = dropforge("config", "show", "train.epoch")
    assert (ended.code, "did you mean 'train.epochs'?" in ended.err) == (2, True)
    write_model(file.parent / "base", b"w")
    ended = dropforge("config", "check")
    assert (ended.code, ended.out) == (
        0,
        "dropforge.toml: the settings can be used, for track default and track support\n",
    )
    file.write_text("[train]\nepochs = -1\n")
    monkeypatch.delenv("DROPFORGE_TRAIN__EPOCHS")
    ended = dropforge("config", "check")
    assert (ended.code, "train.epochs" in ended.err) == (2, True)


def test_settings_whose_base_model_is_not_there_cannot_be_used(file: Path, dropforge: Any) -> None:
    ended = dropforge("config", "check")
    assert (ended.code, ended.out) == (2, "")
    words = f"there is no base model folder {file.parent / 'base'}"
    assert ended.err == (
        f"error: dropforge.toml: base of default: {words}; base of support: {words}\n"
        "hint: set base_model to the folder of a model in transformers' format\n"
    )
    file.write_text("[train]\nepochs = 1\n")
    assert "base of default: no base model is set" in dropforge("config", "check").err
