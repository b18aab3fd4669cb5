"""What settings need and the machine lacks is refused wherever a person may ask, not by a run at night."""

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.views import doctor, preflight
from tests.model_families import write_config
from tests.model_folder import write_model

Command = Callable[..., Any]
#: A setting; whose line in `doctor` tells of it, with which words and remedy.
NEEDS = {
    '[evaluate]\ngeneral = ["gone.jsonl"]': ("suites of default", "there is no suite", "evaluate.general"),
    '[evaluate]\nvllm = "/gone/vllm"': ("vLLM of default", "there is no program /gone/vllm", "path"),
    '[export]\ngguf = ["gone-gguf"]': ("export.gguf", "there is no program gone-gguf", "install it"),
    '[hooks]\nbefore_training = ["gone-stop"]': (
        "hooks.before_training",
        "there is no program gone-stop",
        "install it",
    ),
    '[tracks.a.hooks]\nhealth = ["gone-look"]': ("hooks of a", "there is no program gone-look", "install it"),
    '[messages]\nurls = ["growl://127.0.0.1"]': ("messages", "Apprise cannot read number 1", "wiki has it"),
    'device = "cuda"': ("training", "torch 2.13.0+cpu computes on CPUs alone", 'set device = "auto"'),
    "[train.search.space]\nrank = [8, 16]": (
        "training",
        "not installed here: optuna",
        "pip install 'dropforge[train]'",
    ),
}


def lack(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine lack what this one has for certain."""
    find_spec, version = importlib.util.find_spec, importlib.metadata.version
    if "search" in setting:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    if "cuda" in setting:
        monkeypatch.setattr(preflight, "version", lambda name: "2.13.0+cpu" if name == "torch" else version(name))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `doctor` try no adapter, which takes seconds."""
    monkeypatch.setattr(doctor, "try_adapter", lambda _folder, _train: {})


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("setting", NEEDS)
def test_a_setting_that_needs_what_is_not_there_is_refused_before_any_run(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropforge: Command
) -> None:
    name, words, remedy = NEEDS[setting]
    write_model(tmp_path / "base", b"w")
    file = tmp_path / "dropforge.toml"
    file.write_text(f'base_model = "base"\n{setting}\n')
    file.chmod(0o600)  # a warning of its own, where there are addresses
    lack(setting, monkeypatch)
    (found,) = (one for one in dropforge("doctor", "--json").json["findings"] if one["name"] == name)
    assert (found["level"], words in found["text"], remedy in found["remedy"]) == ("bad", True, True), found
    for command, code in ((("config", "check"), 2), (("run",), 1)):
        refused = dropforge(*command)
        assert (refused.code, refused.err) == (
            code,
            f"error: dropforge.toml: {name}: {found['text']}\nhint: {found['remedy']}\n",
        )


@pytest.mark.usefixtures("untried")
def test_what_steps_need_may_be_in_the_environment_of_a_worker_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropforge: Command
) -> None:
    write_model(tmp_path / "base", b"w")
    (tmp_path / "dropforge.toml").write_text('base_model = "base"\nworker = "separate"\n')
    lack("search", monkeypatch)
    assert dropforge("config", "check").code == 0
    found = {one["name"]: one["level"] for one in dropforge("doctor", "--json").json["findings"]}
    assert found["training"] == "warn"


def test_a_base_without_a_default_template_is_refused_by_init_and_doctor_unless_none_is_used(
    tmp_path: Path, dropforge: Command
) -> None:
    write_model(tmp_path / "base", b"w")
    (tmp_path / "base/additional_chat_templates").mkdir()
    (tmp_path / "base/additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    refused = dropforge("init", "box", "--base-model", "base")
    assert (refused.code, "no chat_template.jinja" in refused.err) == (65, True)
    for setting, level in (("", "bad"), ('[train]\nformat = "alpaca"\n', "ok")):
        (tmp_path / "dropforge.toml").write_text(f'base_model = "base"\n{setting}')
        findings = dropforge("doctor", "--json").json["findings"]
        assert [one["level"] for one in findings if one["name"] == "base of default"] == [level]
    assert dropforge("init", "--base-model", "base").code == 0, "the settings that are there have this format"


def test_a_base_whose_layers_get_no_adapter_is_refused_by_init_and_doctor_and_its_experts_are_named(
    tmp_path: Path, tiny_llama: Path, dropforge: Command
) -> None:
    base = write_config(Path(shutil.copytree(tiny_llama, tmp_path / "base")), "deepseek_v3")
    refused = dropforge("init", "box", "--base-model", "base")
    assert (refused.code, "in a DeepseekV3ForCausalLM without an adapter" in refused.err) == (65, True)
    assert not (tmp_path / "box").exists()
    (tmp_path / "dropforge.toml").write_text('base_model = "base"\n')
    (found,) = (one for one in dropforge("doctor", "--json").json["findings"] if one["name"] == "base of default")
    assert (found["level"], found["remedy"].startswith("set train.targets = [")) == ("bad", True)
    write_config(base, "qwen3_moe")
    said = dropforge("init", "--base-model", "base").out
    assert "base model base: a training leaves its experts, 49,152 weights, as they are" in said
