"""What README.md and its kin claim, run as far as it is cheap; tests/systemd runs the installation as a service."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from daemon.inbox.answers.remarks import rows_for_verdict
from daemon.queue.states import ALLOWED
from daemon.settings.model import TrackSettings
from daemon.state import layout
from daemon.state.states import RunState

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USING = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: Of this environment, or of the one that tests/test_installation.py made.
DROPFORGE = Path(os.environ.get("TESTED_BIN", Path(sys.executable).parent)) / "dropforge"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "daemon").rglob("*.md"),
        *(ROOT / "pipeline").rglob("*.md"),
    ]
)
FOLDERS = sorted(path.parent for room in ("daemon", "pipeline") for path in (ROOT / room).rglob("__init__.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def in_backticks(text: str) -> set[str]:
    """Return what a text names, without its blocks of code."""
    return set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)))


def named_paths(text: str) -> set[str]:
    """Return the files and folders of the repository that a text names, not those that the program makes."""
    ours = r"(?:daemon|pipeline|schemas|systemd|tests|bench|\.ci)/[\w./-]*|[\w/]+\.(?:py|md)|Makefile|pyproject\.toml"
    return {name for name in in_backticks(text) if re.fullmatch(ours, name)} - {"__init__.py"}


def lost_paths(document: Path) -> list[str]:
    """Return the paths that a document names and that are neither below the root nor beside it."""
    named = named_paths(document.read_text(encoding="utf-8"))
    return sorted(name for name in named if not ((ROOT / name).exists() or (document.parent / name).exists()))


def lost_modules(text: str) -> list[str]:
    """Return the dotted names of ours that a text names and that lead to no module, nor to a name in one."""
    found = re.findall(r"\b(?:daemon|pipeline)(?:\.\w+)+", " ".join(in_backticks(text)))
    files = {layout.LEASE_NAME, layout.LOCK_NAME}  # their names look like those of modules
    return sorted(name for name in found if name not in files and source(name) is None and not is_in_module(name))


def source(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def is_in_module(name: str) -> bool:
    module, _, word = name.rpartition(".")
    path = source(module)
    return path is not None and re.search(rf"\b{word}\b", path.read_text(encoding="utf-8")) is not None


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Return the names of all commands."""
    done = subprocess.run([DROPFORGE, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"^  ([a-z-]+)  ", done.stdout, re.MULTILINE))


@pytest.mark.parametrize(("name", "most"), [("README.md", 150), ("CONTRIBUTING.md", 150), ("CHANGELOG.md", 100)])
def test_it_is_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


def test_the_changelog_names_the_version_and_every_command(known: set[str]) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == PROJECT["version"]
    words = {word for name in in_backticks(changelog) for word in name.split()}
    assert {name for name in known if not name.startswith("-")} - words == set()


def test_the_commands_that_documents_name_exist(known: set[str]) -> None:
    documents = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    named = set(re.findall(r"(?:`|^)dropforge ([a-z-]+)", documents, re.MULTILINE))
    assert {"init", "run", "check", "submit", "logs", "retry", "cancel", "status", "show", "report"} <= named
    assert named <= known


def test_its_tree_is_the_tree() -> None:
    shown = set(re.findall(r"^(\w+)/  ", CONTRIBUTING, re.MULTILINE))
    made = {"build", "demo", "dist", "dropforge.egg-info"}  # by the targets of make, and ignored
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert shown == folders - made


def test_its_pictures_are_small() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    assert sum((ROOT / picture).stat().st_size for picture in pictures) <= 200_000


def test_its_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_state_chart_is_what_the_queue_allows() -> None:
    drawn = set(re.findall(r"^  (\w+) --> (\w+)(?::.*)?$", USING, re.MULTILINE))
    allowed = {(start.value, end.value) for start, ends in ALLOWED.items() for end in ends if end != start}
    assert drawn == allowed
    assert {state for edge in drawn for state in edge} == {state.value for state in RunState}


def test_the_rows_that_a_first_verdict_takes_are_those_of_the_program() -> None:
    enough, surely = re.findall(r"[\d,]{3,}", rows_for_verdict(TrackSettings()))
    said = f"about {enough} rows (200 and {surely} where answers are JSON or longer than 5 words)"
    assert said in " ".join(USING.split())
    assert f"about {enough} rows" in " ".join(README.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_what_a_document_names_is_there(document: Path) -> None:
    assert lost_paths(document) == []
    assert lost_modules(document.read_text(encoding="utf-8")) == []


def test_a_path_that_is_not_there_would_be_seen(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("`daemon/watcher.py`, `verdict.py`, `daemon/service.py`, `inbox/done/`", encoding="utf-8")
    assert lost_paths(document) == ["daemon/watcher.py", "verdict.py"]
    assert lost_modules("`python -m daemon.settings_schema`, `daemon.settings.load`") == ["daemon.settings_schema"]


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_a_folder_says_what_it_is_for(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")), clean=False) or ""
    assert len(text.splitlines()) <= 10
    assert "\nIn: " in text or folder.name in {"system", "demo"}
    assert re.search(r"Open `?\w+|open the one", text, re.IGNORECASE)
    beside = {name for name in in_backticks(text) if re.fullmatch(r"[a-z_]+", name)}
    known = {path.stem for path in folder.iterdir()} | {"drop", "pipeline"}  # a table, and the other room
    assert beside <= known
