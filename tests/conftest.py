"""What holds for all tests, and the tiny models and attempts that several share."""

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pipeline import durable
from pipeline.artifacts import Artifact
from pipeline.config import RunConfig
from pipeline.contract import Attempt
from tests.made_artifacts import made_spec

# Before any test imports the training stack: models are folders of this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# What is tested is the same on every machine; tests/gpu alone uses a GPU.
os.environ["DROPFORGE_DEVICE"] = "cpu"
# Several tests run at once: with more threads each would hold a processor that the others need.
os.environ["OMP_NUM_THREADS"] = "1"

_MEMORY = "/dev/shm"  # noqa: S108 - pytest makes a folder in it that is its user's alone
#: What a whole run of the tests may need at once.
_ROOM = 4 * 2**30


def _is_memory_of_use() -> bool:
    """Say whether there is a file system in memory that has room enough and from which programs can be started."""
    try:
        found = os.statvfs(_MEMORY)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize >= _ROOM and not found.f_flag & os.ST_NOEXEC


# Each commit waits for the disk, which is most of the time of a test with a database. No test cuts the power of the
# folder that it is given: those that do, and those that fill a disk, make one.
if _is_memory_of_use():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)

# A slow machine is no failure.
settings.register_profile("dropforge", deadline=None)
settings.load_profile("dropforge")

#: What `make test` leaves to `make test-all`: processes killed at many points, other users, systemd, a browser, and
#: models that really learn. Single long tests elsewhere are marked where they stand.
_LONG_FOLDERS = {"browser", "chaos", "gpu", "hostile", "prove", "systemd"}
_QUICK_FILES = {"chaos/test_corpus.py", "hostile/test_backup.py", "hostile/test_judge.py", "hostile/test_settings.py"}


#: Whether tests/gpu can run: torch takes seconds to say it.
HAS_GPU = Path("/proc/driver/nvidia/version").exists()


def pytest_report_header() -> str:
    """Say at the head whether the tests on a GPU run."""
    return "gpu: tests/gpu runs" if HAS_GPU else "gpu: tests/gpu is left out, no NVIDIA driver is loaded"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is long by its folder, before pytest chooses by markers."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent)
        if place.parts[0] in _LONG_FOLDERS and place.as_posix() not in _QUICK_FILES:
            item.add_marker(pytest.mark.long)
        if place.parts[0] == "gpu":
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collections, each of which took half a second with torch's objects."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests measured, a line each: `record_property("table", text)`."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    found = [getattr(report, "user_properties", ()) for report in reports if getattr(report, "when", "") == "call"]
    noted = [(name, value) for properties in found for name, value in properties]
    if lines := sorted(str(text) for name, text in noted if name == "table"):
        terminalreporter.section("measured")
        terminalreporter.write("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module tests/tiny_llama.py: `make_model`, `rows`, `settings`."""
    from tests import tiny_llama  # noqa: PLC0415 - its environment is set above

    return tiny_llama


@pytest.fixture(scope="session")
def made_reports() -> Any:
    """The module tests/made_reports.py: runs that ended in each verdict, of written artifacts."""
    from tests import made_reports  # noqa: PLC0415 - only tests of cards need it

    return made_reports


@pytest.fixture(scope="session")
def tiny_llama(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a chat template. Tests must not change it."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    tiny.make_model(folder)
    # As in pytest_collection_finish: making the model imported the rest of transformers.
    gc.freeze()
    return folder


@pytest.fixture(scope="session")
def tiny_llama_alpaca(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a chat template. Tests must not change it."""
    folder = tmp_path_factory.mktemp("models") / "alpaca"
    tiny.make_model(folder, chat=False)
    return folder


@pytest.fixture
def new_run(tiny: Any, tmp_path: Path, make_attempt: Callable[..., Attempt]) -> Callable[..., Any]:
    """Begin a TrainingRun on a base: new_run(base, rows, dev rows, **settings of [train]), by default on 50 and 24."""
    from tests.training_runs import TrainingRun  # noqa: PLC0415 - only tests of trainings load torch

    usual = tiny.rows(74, seed=3)

    def begin(base: Path, rows: Any = usual[:50], dev: Any = usual[50:], **settings: Any) -> TrainingRun:
        return TrainingRun(tmp_path, base, rows, dev, make_attempt, settings)

    return begin


@pytest.fixture
def make_attempt(tmp_path: Path) -> Callable[..., Attempt]:
    """
    A factory of real attempts in `tmp_path`: make_attempt(step, config=RunConfig, inputs={step: Artifact}).

    Each call is the step's next attempt in the same run, sharing inputs' place and the checkpoint folder.
    """
    counts: dict[str, int] = {}

    def make(step: str, *, config: RunConfig, inputs: Mapping[str, Artifact] | None = None) -> Attempt:
        counts[step] = counts.get(step, 0) + 1
        folder = tmp_path / f"runs/1/attempts/{step}-{counts[step]}"
        folder.mkdir(parents=True)
        published = {}
        for name, artifact in (inputs or {}).items():
            published[name] = f"runs/1/{name}.json"
            durable.write_json(tmp_path / published[name], artifact.model_dump(mode="json"))
        return Attempt(made_spec(tmp_path, step, config, attempt=counts[step], inputs=published))

    return make
