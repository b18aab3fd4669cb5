"""The project's own files say the same thing in every place."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest

from tests import schemas

ROOT = Path(__file__).parents[1]
PYPROJECT_TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads(PYPROJECT_TEXT)
PROJECT = PYPROJECT["project"]


def recipe(target: str) -> list[str]:
    """Return the commands of a target as make prints them, with what it depends on taken as done."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "--assume-old=.venv/.installed", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        # As a user calls it: the make that runs the tests passes on its own PYTHON and VENV.
        env={name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ},
    )
    return [line for line in done.stdout.splitlines() if not line.startswith("make")]


def test_the_hooks_run_what_make_lint_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^ +entry: (.*)$", hooks, re.MULTILINE) == recipe("lint")


def test_what_one_target_leaves_out_of_the_tests_another_runs() -> None:
    quick, everything = recipe("test"), recipe("test-all")
    assert quick == ['.venv/bin/pytest --numprocesses 2 --dist worksteal -m "not long"']
    assert everything == [".venv/bin/pytest --numprocesses 3 --dist worksteal --ignore tests/prove"]
    assert recipe("prove")[0].endswith(" tests/prove")


@pytest.mark.parametrize("name", schemas.MADE)
def test_a_schema_in_the_tree_is_the_one_that_the_code_gives(name: str) -> None:
    written = (ROOT / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
    assert written == schemas.text(name), "make schemas"
    jsonschema.Draft202012Validator.check_schema(schemas.MADE[name]())


def test_the_control_plane_depends_on_no_training_stack() -> None:
    names = {re.split(r"[^a-z-]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert "sqlmodel" in names
    assert not names & {"torch", "transformers", "datasets", "evaluate", "peft", "trl", "numpy", "scipy", "accelerate"}


def test_dependencies_are_ranges() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"train", "dev"}
    for requirement in [*PROJECT["dependencies"], *(one for extra in extras.values() for one in extra)]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+(,<[0-9]+)?", requirement), requirement


def test_every_exception_of_the_linter_says_why() -> None:
    lint = PYPROJECT["tool"]["ruff"]["lint"]
    assert lint["select"] == ["ALL"]
    section = PYPROJECT_TEXT.partition("[tool.ruff.lint]")[2].partition("[tool.ruff.lint.pydocstyle]")[0]
    explained = set(re.findall(r'"([A-Z]+\d*)"\]?,? *# \w', section))
    told_together = {"EM102", "TRY003", "PLR0917", "S607"}  # the line above them speaks for them
    ignored = set(lint["ignore"]).union(*lint["per-file-ignores"].values())
    assert ignored == explained | told_together
