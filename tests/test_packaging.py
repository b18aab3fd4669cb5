"""`daemon`, `pipeline` and `schemas` are plain names: a collision shows here, and what a wheel holds."""

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import daemon
import pipeline

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_no_other_distribution_has_our_names() -> None:
    assert Path(*daemon.__path__).parent == Path(*pipeline.__path__).parent == ROOT
    owners = importlib.metadata.packages_distributions()
    for name in ("daemon", "pipeline", "schemas"):
        assert set(owners.get(name, [])) <= {"dropforge"}


def test_a_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = importlib.metadata.version("dropforge")
    assert {name.partition("/")[0] for name in names} == {
        "daemon",
        "pipeline",
        "schemas",
        f"dropforge-{version}.dist-info",
    }
    ours = {
        path.relative_to(ROOT).as_posix() for room in ("daemon", "pipeline") for path in (ROOT / room).rglob("*.py")
    }
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "schemas").glob("*.json")}
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline/report/templates").iterdir()}
    assert ours <= set(names)
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|README\.md$|\.png$", name)]


def test_an_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel],
        check=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import daemon, pipeline; print(*daemon.__path__, *pipeline.__path__)"
    run = [sys.executable, "-P", "-c"]
    done = subprocess.run([*run, where], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [str(site / "daemon"), str(site / "pipeline")]
    command = (
        f"import sys; sys.argv = ['dropforge', 'init', '{tmp_path / 'workspace'}']; from daemon.cli import main; main()"
    )
    subprocess.run([*run, command], env=environment, check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "workspace" / "dropforge.toml").is_file()
