"""A workspace whose steps are done by a script; a run that is ordered here, or is a job of a scripted Slurm."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine

from daemon.dispatch import slurm
from daemon.settings.model import Settings
from daemon.state.database import create, open_engine
from tests.daemon.dispatch.scripted_house import COMMANDS, House
from tests.daemon.dispatch.test_dispatcher import Box, ScriptedExecutor
from tests.model_folder import write_model


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    write_model(tmp_path / "base", b"base weights")
    for name in ("state", "inbox"):
        (tmp_path / name).mkdir()
    return Settings(inbox=str(tmp_path / "inbox"), state=str(tmp_path / "state"), base_model=str(tmp_path / "base"))


@pytest.fixture
def engine(settings: Settings) -> Engine:
    path = settings.state_folder / "dropforge.db"
    create(path)
    return open_engine(path)


@pytest.fixture
def executor() -> ScriptedExecutor:
    return ScriptedExecutor()


@pytest.fixture
def box(engine: Engine, settings: Settings, executor: ScriptedExecutor) -> Box:
    return Box(engine, settings, executor)


@pytest.fixture(params=["local", "slurm"])
def house(
    request: pytest.FixtureRequest, engine: Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[House]:
    """Give a dispatcher with a run that is due; no worker runs, and no job begins."""
    cluster = None
    if request.param == "slurm":
        cluster = tmp_path / "cluster"
        (cluster / "jobs").mkdir(parents=True)
        for name, script in COMMANDS.items():
            (cluster / name).write_text(f"#!/bin/sh\nset -e\ncd {cluster}\n{script}\n")
            (cluster / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(cluster), prepend=":")
        # Its minutes are hundredths of a second.
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() * 6000, strftime=time.strftime, time=time.time)
        monkeypatch.setattr(slurm, "time", clock)
    made = House(engine, settings, cluster)
    yield made
    made.stop()
