"""The command `config`: the settings in force, and whether they can be used."""

from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dropforge.toml"
    path.write_text(FILE)
    return path


def test_config_show_and_check(file: Path, dropforge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFORGE_TRAIN__EPOCHS", "2")
    found = {
        one["name"]: (one["value"], one["default"]) for one in dropforge("config", "show", "--json").json["settings"]
    }
    assert (found["train.epochs"], found["train.rank"], found["train.seed"]) == ((2, "auto"), (8, 16), (42, 42))
    assert found["hooks.after_promotion"] == (["sh", "reload"], [])
    assert (found["tracks.support.train.rank"], found["tracks.support.judge.records"]) == ((4, None), (5, None))
    assert found["guards.floors"] == ({}, {})
    assert "train.rank" in dropforge("config").out
    assert dropforge("config").out == dropforge("config", "show").out
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
