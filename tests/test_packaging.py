"""`daemon`, `pipeline` and `schemas` are plain names: a collision shows here, and what a wheel holds."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import daemon
import pipeline

ROOT = Path(__file__).parents[1]


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
