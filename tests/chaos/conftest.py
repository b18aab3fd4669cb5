"""How much of the chaos is tried: a seeded sample, or all of it with DROPFORGE_CHAOS=whole (`make chaos`)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def whole() -> bool:
    """Whether everything is tried."""
    return os.environ.get("DROPFORGE_CHAOS") == "whole"


@pytest.fixture(scope="session")
def seed(testrun_uid: str) -> int:
    """What chooses the sample in all of pytest's processes: DROPFORGE_CHAOS_SEED, or another one each time."""
    return int(os.environ.get("DROPFORGE_CHAOS_SEED") or int(testrun_uid, 16) % 10**6)


@contextmanager
def asked(module: str, folder: str, **how: Any) -> Iterator[Callable[[object], Any]]:
    """Start a module that answers each line of JSON with one; give a function that asks it."""
    argv = [sys.executable, "-m", module, folder]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, cwd=ROOT, text=True, **pipes, **how) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def ask(request: object) -> Any:
            print(json.dumps(request), file=requests, flush=True)
            return json.loads(answers.readline())

        yield ask
        requests.close()
