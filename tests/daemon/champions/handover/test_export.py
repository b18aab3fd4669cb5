"""A champion is copied out of the house: whole or not at all, with a card, or as a GGUF file that is the champion."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from daemon.champions.handover.export import Wanted, export, hub_readme
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_id, verify_manifest
from tests.chaos.house import START, Daemon, build, records
from tests.recorded import record

NASTY = "a|b<img src=x onerror=alert(1)>[l](http://e)`c`.jsonl"


class Box:
    """A workspace whose first run was promoted, and its champion."""

    def __init__(self, folder: Path, name: str = "a.jsonl") -> None:
        build(folder)
        (folder / "inbox" / name).write_bytes(records("a"))
        self.daemon = Daemon(folder, START)
        self.daemon.take_in(START)
        self.daemon.finish_runs(START, "promoted")
        self.root = self.daemon.root
        self.identity, _ = record(self.daemon, ["own"] * 9, ["other"] * 9)
        self.champion = (self.root / "tracks" / "default" / "champion").resolve()


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_copy_is_the_champion_with_its_manifest(box: Box, tmp_path: Path) -> None:
    target = tmp_path / "out" / "copy"
    words = export(box.champion, box.identity, target, Wanted(folder=True))
    assert verify_manifest(target) == box.identity
    assert words.startswith(f"{target}: model {box.identity[:12]}, ")
    assert leftovers(target.parent) == ["copy"]


def test_a_base_model_is_copied_without_what_else_lies_in_its_folder(tmp_path: Path) -> None:
    build(tmp_path)
    base = tmp_path / "base"
    (base / "private.txt").write_text("not for others")
    (base / "LICENSE").write_text("do as you like")
    export(base, model_id(base), tmp_path / "copy", Wanted(folder=True))
    assert model_id(tmp_path / "copy") == model_id(base)
    assert "LICENSE" in leftovers(tmp_path / "copy")
    assert "private.txt" not in leftovers(tmp_path / "copy")


def test_what_is_there_is_not_written_over(box: Box, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.mkdir()
    with pytest.raises(DropforgeError, match="is there already"):
        export(box.champion, box.identity, target, Wanted(folder=True))
    assert leftovers(target) == []


def test_a_champion_that_is_not_what_it_was_is_not_handed_over(box: Box, tmp_path: Path) -> None:
    (weights,) = box.champion.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b"x")
    before = leftovers(tmp_path)
    with pytest.raises(DropforgeError, match="is not what it was"):
        export(box.champion, box.identity, tmp_path / "copy", Wanted(folder=True))
    assert leftovers(tmp_path) == before


def test_a_copy_that_fails_leaves_nothing(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = leftovers(tmp_path)

    def full(_source: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "publish_folder", full)
    with pytest.raises(OSError, match="No space left"):
        export(box.champion, box.identity, tmp_path / "copy", Wanted(folder=True))
    assert leftovers(tmp_path) == before


def test_the_card_has_what_the_hub_reads_and_where_the_model_comes_from(box: Box, tmp_path: Path) -> None:
    card = hub_readme(box.root, 1, box.identity, "mine")
    export(box.champion, box.identity, tmp_path / "mine", Wanted(folder=True, readme=card))
    read = ModelCard.load(tmp_path / "mine" / "README.md")
    result = (read.data.eval_results or [])[0]
    assert (result.metric_type, result.metric_value, result.task_type) == ("exact_match", 50.0, "text-generation")
    assert read.data.to_dict()["model-index"][0]["name"] == "mine"
    assert read.data.library_name == "transformers"
    for words in ("run 1:", f"id {box.identity}", r"a\.jsonl".replace("\\", ""), "base model: id b"):
        assert words in read.text.replace("\\", "")
    assert verify_manifest(tmp_path / "mine") == box.identity
    assert "*.safetensors filter=lfs" in (tmp_path / "mine" / ".gitattributes").read_text()


def test_the_card_of_trained_weights_speaks_of_no_adapter(box: Box) -> None:
    assert "Trained with QLoRA" in hub_readme(box.root, 1, box.identity, "mine")
    path = box.root / "runs" / "1" / "train.json"
    durable.write_json(path, {**durable.read_object(path), "kind": "weights"})
    card = hub_readme(box.root, 1, box.identity, "mine")
    assert "Trained in the base's own weights" in card
    assert "- weights: sha256 " in card
    assert "qlora" not in card.lower()


def test_a_files_name_is_inert_in_the_card(tmp_path: Path) -> None:
    box = Box(tmp_path, NASTY.replace("/", ""))
    text = hub_readme(box.root, 1, box.identity, "mine")
    (line,) = (line for line in text.splitlines() if line.startswith("| a"))
    assert r"a\|b\<img" in line
    for sign in "<>[]`":
        assert sign not in line.replace(f"\\{sign}", "")


def test_there_is_no_card_of_a_base_model_or_of_another_runs(box: Box) -> None:
    with pytest.raises(DropforgeError, match="nothing was trained"):
        hub_readme(box.root, None, box.identity, "mine")
    with pytest.raises(DropforgeError, match="do not tell of model"):
        hub_readme(box.root, 1, "0" * 64, "mine")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("pass", "made no file"),
        ("open(sys.argv[3], 'wb').write(b'PK')", "is no GGUF file"),
    ],
)
def test_a_command_that_makes_no_gguf_file_leaves_nothing_but_what_it_said(
    box: Box, tmp_path: Path, code: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = leftovers(tmp_path)
    command = (sys.executable, "-c", f"import sys\nprint('on layer 1')\n{code}")
    with pytest.raises(DropforgeError, match=words):
        export(box.champion, box.identity, tmp_path / "copy", Wanted(folder=False, gguf=command))
    assert ("on layer 1" in capfd.readouterr().err) == ("no GGUF" not in words)
    with pytest.raises(DropforgeError, match="no-such-program: No such file"):
        export(box.champion, box.identity, tmp_path / "copy", Wanted(folder=False, gguf=("no-such-program",)))
    assert leftovers(tmp_path) == before


def test_a_file_that_is_another_model_or_cannot_be_compared_is_not_handed_over(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-c", "import sys; open(sys.argv[3], 'wb').write(b'GGUF')")
    before = leftovers(tmp_path)
    with pytest.raises(DropforgeError, match="could not be compared with the champion"):
        export(box.champion, box.identity, tmp_path / "copy", Wanted(folder=False, gguf=command))
    far = [sys.executable, "-c", """print('{"distance": 0.2, "top1": 0.99}')"""]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda argv, **how: run(far if "--check" in argv else argv, **how))
    with pytest.raises(DropforgeError, match=r"copy\.gguf is not the champion: its logits 0\.2"):
        export(box.champion, box.identity, tmp_path / "copy", Wanted(folder=False, gguf=command))
    assert leftovers(tmp_path) == before
