"""The project's own files say the same thing in every place."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT_TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads(PYPROJECT_TEXT)
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


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


def test_every_target_sets_itself_up() -> None:
    for target in ("demo", "test", "test-all", "chaos", "prove", "fuzz", "lint", "bench"):
        assert re.search(rf"^{target}: \$\(INSTALLED\) ## \S", MAKEFILE, re.MULTILINE), target
        assert len(recipe(target)) >= 1


def test_what_one_target_leaves_out_of_the_tests_another_runs() -> None:
    quick, everything = recipe("test"), recipe("test-all")
    assert quick == ['.venv/bin/pytest --numprocesses 2 --dist worksteal -m "not long"']
    assert everything == [".venv/bin/pytest --numprocesses 2 --dist worksteal --ignore tests/prove"]
    assert recipe("prove")[0].endswith(" tests/prove")


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., tuple[bool, list[str]]]:
    """Run .ci/run where these versions of Python are; return whether it passed, and what it said and let make do."""
    for name in ("bash", "dirname", "grep", "head", "sort", "tail"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))

    def run(*versions: str, fails: str = "nothing") -> tuple[bool, list[str]]:
        scripts = {f"python{one}": f'echo "{one} $3"' for one in versions}
        if versions:
            scripts["python3"] = f'echo "{versions[0]} $3"'
        scripts |= {"apt-get": "exit 0", "make": f'echo "make $*"; for last; do :; done; test "$last" != {fails}'}
        for name, body in scripts.items():
            (tmp_path / name).write_text(f"#!{shutil.which('sh')}\n{body}\n")
            (tmp_path / name).chmod(0o755)
        command = ["bash", str(ROOT / ".ci" / "run")]
        done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
        return done.returncode == 0, done.stdout.replace(f"{tmp_path}/", "").splitlines()

    return run


def test_the_check_before_landing_runs_lint_and_all_tests_on_the_oldest_python_the_quick_ones_on_the_newest(
    check: Callable[..., tuple[bool, list[str]]],
) -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    passed, said = check("3.12", "3.11", "3.13", "3.14")
    on_oldest, on_newest = "make PYTHON=python3.11", "make PYTHON=python3.13 VENV=.venv-3.13"
    assert passed
    assert said[0] == ".ci/run: lint and all tests on Python 3.11 python3.11, the quick tests on 3.13 python3.13"
    assert {f"{on_newest} install", f"{on_oldest} lint"} == set(said[1:3])
    assert said[3:] == [f"{on_newest} test", f"{on_oldest} test-all"], "the larger summary is the last"
    for part in ("install", "lint", "test", "test-all"):
        assert not check("3.12", "3.11", "3.13", fails=part)[0], part


def test_the_check_before_landing_says_what_it_does_with_one_python_or_none(
    check: Callable[..., tuple[bool, list[str]]],
) -> None:
    assert check() == (False, [])
    assert check("3.14")[0] is False
    passed, said = check("3.12")
    assert (passed, said[1:]) == (True, ["make PYTHON=python3 lint", "make PYTHON=python3 test-all"])
    assert said[0].startswith(".ci/run: one Python here, 3.12 python3: lint and all tests on it")


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


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{PROJECT['version']}]" in changelog
    assert set(re.findall(r"^### (\w+)$", changelog, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }


def test_decisions_are_dated_and_give_their_reason() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    decisions = contributing.partition("## Decisions")[2].strip().split("\n### ")
    assert len(decisions) > 1
    for decision in decisions:
        assert re.match(r"(### )?\d{4}-\d{2}-\d{2}: ", decision), decision.splitlines()[0]
        assert len(decision.splitlines()) > 1, decision


def test_the_licence_is_apache() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_what_the_program_makes_is_not_tracked(tmp_path: Path) -> None:
    paths = [
        ".dropforge/dropforge.db",
        "inbox/drop.jsonl",
        "demo/base/config.json",
        ".venv/bin/python",
        ".venv-3.13/bin/python",
        "dropforge.toml",
    ]
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    done = subprocess.run(["git", "check-ignore", *paths], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == paths
    kept = subprocess.run(["git", "check-ignore", "inbox/.gitkeep"], cwd=tmp_path, capture_output=True, check=False)
    assert kept.returncode == 1
