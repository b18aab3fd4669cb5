"""Odd answers of Slurm's commands, and damaged files of an attempt on a cluster, stop no other attempt."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.dispatch.slurm import SlurmExecutor
from daemon.dispatch.spool import JobState
from daemon.settings.sections import ExecutorSettings
from daemon.state.run_files import load_progress
from daemon.state.troubles import Troubles
from daemon.system.folders import WorkFolder
from daemon.system.slurm_commands import CannotAsk, job_number
from pipeline import durable
from pipeline.contract import CLAIM_NAME, JOB_NAME, JOB_STATE_NAME, PROGRESS_NAME, REVOKED_NAME, StepSpec
from tests.made_artifacts import made_spec

ODD = "".join(f"{number}|dropforge-one.9-train-1|fence|RUNNING|None|n\\n" for number in ("²", "7" * 5000, "-1", ""))


class Watched(SlurmExecutor):
    """An executor whose turns can be waited for."""

    def __init__(self, *arguments: Any) -> None:
        self._turned = threading.Event()
        super().__init__(*arguments)

    def _turn(self) -> None:
        super()._turn()
        self._turned.set()

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it holds after a turn of the thread."""
        while not holds():
            self._turned.clear()
            assert self._turned.wait(60)


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """An executor whose Slurm answers with odd lines."""
    said = {"squeue": f"printf '{ODD}'", "sbatch": "echo 7", "scontrol": "true", "scancel": "true"}
    for name in ("bin", "runs"):
        (tmp_path / name).mkdir()
    for name, line in said.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    settings = ExecutorSettings(kind="slurm", poll_seconds=0.1)
    made = Watched("one", WorkFolder(tmp_path), settings, Troubles())
    yield made
    made.stop()


def submitted(executor: Watched, root: Path) -> StepSpec:
    spec = made_spec(root, "train", grace_seconds=0)
    executor.submit(spec)
    executor.until(lambda: durable.read_object(root / spec.folder / JOB_NAME).get("released") is True)
    return spec


def test_an_odd_number_of_a_job_keeps_no_attempt_from_being_submitted(executor: Watched, tmp_path: Path) -> None:
    assert executor.poll(submitted(executor, tmp_path)) is JobState.QUEUED
    assert job_number("Welcome, says a site's wrapper\n7;cluster\n") == 7
    for said in ("²", "7" * 5000):
        with pytest.raises(CannotAsk, match="said no job's number"):
            job_number(said)


@pytest.mark.parametrize("text", ["", "{half", "[1]", '"x"'])
def test_an_attempt_whose_revocation_is_damaged_ends(executor: Watched, tmp_path: Path, text: str) -> None:
    spec = submitted(executor, tmp_path)
    (tmp_path / spec.folder / REVOKED_NAME).write_text(text)
    executor.cancel(spec.key)
    executor.until(lambda: executor.poll(spec) is JobState.ENDED)
    assert (tmp_path / spec.folder / CLAIM_NAME).exists(), "no node begins it any more"


@pytest.mark.parametrize(
    "text",
    ['{"job":1,"nodes":"n"}', '{"job":1,"since":"x"}', '{"job":1,"since":1e300}', '{"job":1,"nodes":"n","state":7}'],
)
def test_a_damaged_note_on_a_job_hides_the_job_and_not_the_progress(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "runs/1/attempts/train-1"
    folder.mkdir(parents=True)
    (folder / JOB_STATE_NAME).write_text(text)
    durable.write_hint(folder / PROGRESS_NAME, {"step": "train", "done": 3, "total": 4})
    found = load_progress(WorkFolder(tmp_path), 1, "train", 1)
    assert found is not None
    assert found.words == "train 3/4"
