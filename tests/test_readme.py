"""What README.md claims, run as far as it is cheap; tests/systemd runs its installation as a service."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.queue.states import ALLOWED
from daemon.state.tables import RunState

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DROPFORGE = Path(sys.executable).parent / "dropforge"
READERS = ("status", "drops", "runs", "show", "champion", "history", "report", "compare")


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def block(title: str) -> list[str]:
    """Return the lines of a section's first code block, but for mermaid's."""
    found = re.search(r"^```\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1].splitlines()


def commands() -> list[str]:
    return sorted(set(re.findall(r"(?<![/\w-])dropforge ([a-z]+)", README)))


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_it_names_the_commands_that_this_test_asks_for() -> None:
    assert {"init", "run", "check", "submit", "logs", "retry", "cancel", *READERS} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_a_command_that_it_names_exists(command: str) -> None:
    done = subprocess.run([DROPFORGE, command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("--json" in done.stdout) or command not in READERS


def test_a_command_that_does_not_exist_would_be_seen() -> None:
    assert subprocess.run([DROPFORGE, "serve", "--help"], capture_output=True, check=False).returncode == 2


def test_the_make_targets_that_it_names_exist() -> None:
    targets = set(re.findall(r"\bmake (demo|test|prove|lint|bench|clean)\b", README))
    assert targets >= {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_its_tree_is_the_tree() -> None:
    shown = {line.split("/")[0] for line in block("The tree")}
    made = {"build", "demo", "dist", "dropforge.egg-info"}  # by the targets of make, and ignored
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert shown == folders - made


def test_its_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_its_state_chart_is_what_the_queue_allows() -> None:
    drawn = set(re.findall(r"^  (\w+) --> (\w+)(?::.*)?$", section("The states of a run"), re.MULTILINE))
    allowed = {(start.value, end.value) for start, ends in ALLOWED.items() for end in ends if end != start}
    assert drawn == allowed
    assert {state for edge in drawn for state in edge} == {state.value for state in RunState}


def test_a_workspace_can_be_made_as_it_says(tmp_path: Path) -> None:
    subprocess.run([DROPFORGE, "init"], cwd=tmp_path, check=True, capture_output=True)
    assert {"dropforge.toml", "inbox", ".dropforge"} <= {path.name for path in tmp_path.iterdir()}
