"""The chapters in docs/: short, in step with the program, and each command in them is run."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from daemon.state import layout
from daemon.web.security import TOKEN_NAME
from pipeline import durable
from pipeline.contract import RESULT_NAME, STORY_NAMES
from tests.daemon.conftest import MODEL_ID, SCRIPT
from tests.state_listing import LISTED, unlisted

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: What the machine of a test lacks, or what must not happen there; the unit itself is run in tests/systemd.
STAND_INS = ("systemctl", "journalctl", "pip")
#: Written by hand.
CHAPTERS = ("using.md", "operations.md", "gate.md", "gpu.md")
#: The commands of the last one are run in tests/e2e/test_slurm.py and tests/systemd, on a real cluster.
TEXTS = (*CHAPTERS, "cluster.md", "words.md", "state.md")


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", text(name), re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def environment(lived_in: Any, tmp_path: Path) -> dict[str, str]:
    """Return what a shell needs in a workspace whose champion has weights, and where a second run has a verdict."""
    root = lived_in.settings.state_folder
    (root / "models" / MODEL_ID / "model.safetensors").write_bytes(b"weights")
    verdict = durable.read_json(root / "runs" / "1" / "decide.json")
    (root / "runs" / "2").mkdir(exist_ok=True)
    durable.write_json(root / "runs" / "2" / "decide.json", verdict)
    stands = tmp_path / "stand-ins"
    stands.mkdir()
    for name in STAND_INS:
        (stands / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/called\n')
        (stands / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DROPFORGE_")}
    return {**kept, "PATH": f"{stands}:{SCRIPT.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_command_of_a_chapter_runs(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    for block in blocks(name):
        for line in block.splitlines():
            done = run(line, tmp_path, environment)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", TEXTS)
def test_a_chapter_is_short(name: str) -> None:
    lines = text(name).splitlines()
    assert len(lines) <= 190
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere_and_the_readme_leads_here(name: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text(name)) if "://" not in target]
    assert [target for target in targets if not (DOCS / target).exists()] == []
    assert f"](docs/{name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_state_folder_is_as_it_is_described(lived_in: Any) -> None:
    named = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    files = named - {layout.TRASH_NAME} | STORY_NAMES | {RESULT_NAME, TOKEN_NAME}
    folders = {path.partition("/")[0] for path in LISTED if "/" in path}
    assert (files - set(LISTED), folders) == (set(), set(layout.FOLDERS))
    assert unlisted(lived_in.settings.state_folder) == []
    (lived_in.settings.state_folder / "runs" / "1" / "other.txt").touch()
    assert unlisted(lived_in.settings.state_folder) == ["runs/1/other.txt"]
