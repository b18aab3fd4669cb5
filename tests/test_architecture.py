"""The laws of the house, run on the tree as it is and on copies with one law broken."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STACK = {"accelerate", "bitsandbytes", "datasets", "evaluate", "matplotlib", "peft", "torch", "transformers", "trl"}
NUMBERS = {"numpy", "scipy"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "manager", "models", "types", "misc"}
TRAINING = "The daemon never loads the training stack, not even through pipeline"
ONE_DOOR = "Only models, train, merge, evaluate and metrics open the training stack"
WINDOW = "Only the judge, messages and the server's hook speak to a network"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Copy what import-linter reads."""
    for room in ("daemon", "pipeline"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{text}\n", encoding="utf-8")


def test_the_tree_keeps_every_import_contract() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert "7 kept, 0 broken" in done.stdout


#: On each floor a module that must not import what stands above it, and one that stands there.
UPWARD = (
    ("daemon/service.py", "daemon.cli"),
    ("daemon/views/overview.py", "daemon.service"),
    ("daemon/messages/texts.py", "daemon.service"),
    ("daemon/views/overview.py", "daemon.messages.outbox"),
    ("daemon/views/overview.py", "daemon.dispatch.dispatcher"),
    ("daemon/inbox/intake.py", "daemon.dispatch.worker"),
    ("daemon/inbox/intake.py", "daemon.champions.promotion"),
    ("daemon/storage/gc.py", "daemon.inbox.intake"),
    ("daemon/queue/run_queue.py", "daemon.champions.promotion"),
    ("daemon/state/tables.py", "daemon.queue.run_queue"),
    ("daemon/settings/model.py", "daemon.state.tables"),
    ("daemon/system/clock.py", "daemon.state.layout"),
    ("pipeline/evaluate/plan.py", "pipeline.prepare.step"),
    ("pipeline/report/facts.py", "pipeline.evaluate.plan"),
    ("pipeline/prepare/split.py", "pipeline.train.trainer"),
    ("pipeline/decide/guards.py", "pipeline.evaluate.plan"),
    ("pipeline/contract.py", "pipeline.decide.explain"),
    ("pipeline/models/template.py", "pipeline.decide.explain"),
    ("pipeline/records/records.py", "pipeline.prepare.split"),
    ("pipeline/words.py", "pipeline.models.template"),
    ("pipeline/decide/step.py", "pipeline.report.write"),
    ("pipeline/models/manifest.py", "pipeline.records.records"),
)


#: A module, an import that it must not have, and the contract that says so.
FORBIDDEN = (
    ("pipeline/durable.py", "import daemon.state.tables", "daemon imports pipeline, never the reverse"),
    ("daemon/queue/run_queue.py", "import torch", TRAINING),
    ("daemon/queue/run_queue.py", "import pipeline.evaluate.step", TRAINING),
    ("pipeline/prepare/step.py", "from transformers import AutoTokenizer", ONE_DOOR),
    ("pipeline/evaluate/step.py", "import httpx2", WINDOW),
    ("daemon/views/doctor.py", "import http", WINDOW),
    ("daemon/messages/texts.py", "import apprise", WINDOW),
    ("pipeline/judge/step.py", "import pipeline.decide.step", "Steps meet in artifacts and never import each other"),
    ("pipeline/train/step.py", "import pipeline.merge.step", "Steps meet in artifacts and never import each other"),
)


def test_each_planted_import_breaks_its_contract(house: Path) -> None:
    for module, above in UPWARD:
        plant(house / module, f"def late():\n    import {above}")
    for module, text, _ in FORBIDDEN:
        plant(house / module, f"def late():\n    {text}")
    found = lint_imports(house).stdout
    broken = set(re.findall(r"^(.+) BROKEN(?: \(.*\))?$", found, re.MULTILINE))
    assert broken == {"Inside daemon imports run downwards", "Inside pipeline imports run downwards"} | {
        contract for _, _, contract in FORBIDDEN
    }
    for module, name in [*UPWARD, *((module, text.split()[1]) for module, text, _ in FORBIDDEN)]:
        planted = f"{module.removesuffix('.py').replace('/', '.')} -> {name}"
        assert re.search(rf"{re.escape(planted)}\b", found), planted


def test_ruff_refuses_a_planted_import_of_torch_at_module_level(house: Path) -> None:
    command = [str(BIN / "ruff"), "check", "--no-cache", "--select", "TID253", "pipeline"]
    clean = subprocess.run(command, cwd=house, capture_output=True, text=True, check=False)
    assert clean.returncode == 0, clean.stdout
    plant(house / "pipeline/metrics/registry.py", "import torch")
    found = subprocess.run(command, cwd=house, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "TID253" in found.stdout


@pytest.mark.parametrize("module", ["daemon.cli", "daemon.service", "daemon.dispatch.worker", "pipeline.__main__"])
def test_the_control_plane_loads_no_training_stack(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert {name.partition(".")[0] for name in loaded} & (STACK | NUMBERS) == set()


def test_a_loaded_torch_would_be_seen() -> None:
    assert "numpy" in loaded_by("import numpy")


def test_no_module_has_a_vague_name() -> None:
    modules = {path.stem for room in ("daemon", "pipeline") for path in (ROOT / room).rglob("*.py")}
    assert len(modules) > 100
    assert not modules & VAGUE_NAMES


def test_the_rooms_hold_no_code_in_their_init() -> None:
    for room in ("daemon", "pipeline"):
        body = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")).body
        assert [type(node) for node in body] == [ast.Expr], (
            "only a docstring: another distribution may overwrite the file"
        )
