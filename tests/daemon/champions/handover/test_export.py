"""A champion is exported: whole or not at all, as a folder, or as a GGUF file that answers as the champion."""

import subprocess
import sys
from pathlib import Path

import pytest

from daemon.champions.handover.export import export
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_id, verify_manifest
from tests.chaos.house import START, Daemon, build, records


class Box:
    """A workspace whose first run was promoted, and its champion."""

    def __init__(self, folder: Path) -> None:
        build(folder)
        (folder / "inbox" / "a.jsonl").write_bytes(records("a"))
        self.daemon = Daemon(folder, START)
        self.daemon.take_in(START)
        self.daemon.finish_runs(START, "promoted")
        self.root = self.daemon.root
        self.champion = (self.root / "tracks" / "default" / "champion").resolve()
        self.identity = self.champion.name


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_copy_is_the_champion_with_its_manifest(box: Box, tmp_path: Path) -> None:
    target = tmp_path / "out" / "copy"
    words = export(box.champion, box.identity, target)
    assert verify_manifest(target) == box.identity
    assert words.startswith(f"{target}: model {box.identity[:12]}, ")
    assert leftovers(target.parent) == ["copy"]


def test_a_base_model_is_copied_without_what_else_lies_in_its_folder(tmp_path: Path) -> None:
    build(tmp_path)
    base = tmp_path / "base"
    (base / "private.txt").write_text("not for others")
    (base / "LICENSE").write_text("do as you like")
    export(base, model_id(base), tmp_path / "copy")
    assert model_id(tmp_path / "copy") == model_id(base)
    assert "LICENSE" in leftovers(tmp_path / "copy")
    assert "private.txt" not in leftovers(tmp_path / "copy")


def test_what_is_there_is_not_written_over(box: Box, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.mkdir()
    with pytest.raises(DropforgeError, match="is there already"):
        export(box.champion, box.identity, target)
    assert leftovers(target) == []


def test_a_champion_that_is_not_what_it_was_is_not_handed_over(box: Box, tmp_path: Path) -> None:
    (weights,) = box.champion.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b"x")
    before = leftovers(tmp_path)
    with pytest.raises(DropforgeError, match="is not what it was"):
        export(box.champion, box.identity, tmp_path / "copy")
    assert leftovers(tmp_path) == before


def test_a_copy_that_fails_leaves_nothing(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = leftovers(tmp_path)

    def full(_source: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "publish_folder", full)
    with pytest.raises(OSError, match="No space left"):
        export(box.champion, box.identity, tmp_path / "copy")
    assert leftovers(tmp_path) == before


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
        export(box.champion, box.identity, tmp_path / "copy", command)
    assert ("on layer 1" in capfd.readouterr().err) == ("no GGUF" not in words)
    with pytest.raises(DropforgeError, match="no-such-program: No such file"):
        export(box.champion, box.identity, tmp_path / "copy", ("no-such-program",))
    assert leftovers(tmp_path) == before


def test_a_file_that_is_another_model_or_cannot_be_compared_is_not_handed_over(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-c", "import sys; open(sys.argv[3], 'wb').write(b'GGUF')")
    before = leftovers(tmp_path)
    with pytest.raises(DropforgeError, match="could not be compared with the champion"):
        export(box.champion, box.identity, tmp_path / "copy", command)
    far = [sys.executable, "-c", """print('{"distance": 0.2, "top1": 0.99}')"""]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda argv, **how: run(far if "--check" in argv else argv, **how))
    with pytest.raises(DropforgeError, match=r"copy\.gguf is not the champion: its logits 0\.2"):
        export(box.champion, box.identity, tmp_path / "copy", command)
    assert leftovers(tmp_path) == before
