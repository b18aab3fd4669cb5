"""A champion is exported: whole or not at all, as a folder, or as a GGUF file that answers as the champion."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from daemon.champions.handover.export import export
from pipeline import durable
from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_id, verify_manifest
from tests.chaos.house import Daemon, build

Command = Callable[..., Any]


@pytest.fixture
def champion(promoted: Daemon) -> Path:
    """The folder of the champion, which has the name of its model."""
    return (promoted.root / "tracks" / "default" / "champion").resolve()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_copy_is_the_champion_with_its_manifest_and_written_over_nothing(
    champion: Path, dropforge: Command, tmp_path: Path
) -> None:
    done = dropforge("export", "--to", "out/copy")
    assert (done.code, done.err) == (0, "")
    target = tmp_path / "out" / "copy"
    assert verify_manifest(target) == champion.name
    assert done.out.startswith(f"{target}: model {champion.name[:12]}, ")
    assert leftovers(target.parent) == ["copy"]
    (target / "model.safetensors").unlink()
    again = dropforge("export", "--to", "out/copy")
    assert (again.code, f"{target} is there already" in again.err) == (1, True)
    assert not (target / "model.safetensors").exists()


def test_a_base_model_is_copied_without_what_else_lies_in_its_folder(tmp_path: Path) -> None:
    build(tmp_path)
    base = tmp_path / "base"
    (base / "private.txt").write_text("not for others")
    (base / "LICENSE").write_text("do as you like")
    export(base, model_id(base), tmp_path / "copy")
    assert model_id(tmp_path / "copy") == model_id(base)
    assert "LICENSE" in leftovers(tmp_path / "copy")
    assert "private.txt" not in leftovers(tmp_path / "copy")


def test_a_champion_that_is_not_what_it_was_is_not_handed_over(champion: Path, tmp_path: Path) -> None:
    (weights,) = champion.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b"x")
    before = leftovers(tmp_path)
    with pytest.raises(DropforgeError, match="has changed"):
        export(champion, champion.name, tmp_path / "copy")
    assert leftovers(tmp_path) == before


def test_a_copy_that_fails_leaves_nothing(champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = leftovers(tmp_path)
    monkeypatch.setattr(durable, "publish_folder", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export(champion, champion.name, tmp_path / "copy")
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
    champion: Path, tmp_path: Path, code: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = leftovers(tmp_path)
    command = (sys.executable, "-c", f"import sys\nprint('on layer 1')\n{code}")
    with pytest.raises(DropforgeError, match=words):
        export(champion, champion.name, tmp_path / "copy", command)
    assert ("on layer 1" in capfd.readouterr().err) == ("no GGUF" not in words)
    with pytest.raises(DropforgeError, match="no-such-program: No such file"):
        export(champion, champion.name, tmp_path / "copy", ("no-such-program",))
    assert leftovers(tmp_path) == before


def test_a_file_that_is_another_model_is_not_handed_over(
    champion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-c", "import sys; open(sys.argv[3], 'wb').write(b'GGUF')")
    before = leftovers(tmp_path)
    far = [sys.executable, "-c", """print('{"distance": 0.2, "top1": 0.99}')"""]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda argv, **how: run(far if "--check" in argv else argv, **how))
    with pytest.raises(DropforgeError, match=r"copy\.gguf is not the champion: its logits 0\.2"):
        export(champion, champion.name, tmp_path / "copy", command)
    assert leftovers(tmp_path) == before
