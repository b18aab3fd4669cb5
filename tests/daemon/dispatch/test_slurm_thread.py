"""The Slurm executor's thread: it goes on after an error, and notes the error in the troubles."""

import contextlib
from pathlib import Path

import pytest
import structlog

from daemon.state.run_files import load_progress
from pipeline import durable
from pipeline.contract import JOB_NAME, JOB_STATE_NAME, SPEC_NAME, StepSpec
from tests.daemon.dispatch.scripted_house import House, engine, house, settings
from tests.slurm.cluster import wait_for

__all__ = ["engine", "house", "settings"]


@pytest.mark.parametrize("house", ["slurm"], indirect=True)
def test_a_log_that_cannot_be_written_ends_no_thread(house: House) -> None:
    house.prepare()
    house.begin()
    spec = StepSpec.model_validate(durable.read_json(house.attempt / SPEC_NAME))
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as full:  # when it is closed
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(full))
        house.slurm.poll(spec)
        wait_for(lambda: "Slurm" in house.slurm._troubles.words)
        structlog.reset_defaults()
    house.wait_until(lambda: durable.read_object(house.attempt / JOB_NAME).get("released"))
    wait_for(lambda: house.slurm._troubles.words == {})


@pytest.mark.parametrize("house", ["slurm"], indirect=True)
def test_a_job_that_is_gone_is_not_shown_as_one_that_waits(house: House) -> None:
    spec = house.submit()
    assert house.cluster is not None
    (house.cluster / "jobs/1").unlink()
    house.wait_until(lambda: durable.read_object(house.attempt / JOB_STATE_NAME).get("state") == "GONE")
    progress = load_progress(house.root, spec.run, spec.step, spec.attempt)
    assert progress is not None
    assert progress.words == "train job 1 has ended: gone"


@pytest.mark.parametrize("house", ["slurm"], indirect=True)
def test_a_new_daemon_cancels_the_job_of_an_attempt_whose_result_it_finds_at_its_first_look(house: House) -> None:
    house.submit()
    house.stop()
    assert house.jobs() != []
    house.do_step("train")
    house.begin()
    house.wait_until(lambda: house.jobs() == [])
