"""The Slurm executor's thread goes on after an error; odd answers of Slurm and damaged files of a job do no harm."""

import contextlib
from pathlib import Path

import pytest
import structlog

from daemon.dispatch.slurm_jobs import Job, note_state
from daemon.state.run_files import load_progress
from daemon.system.folders import WorkFolder
from daemon.system.slurm_commands import CannotAsk, job_number
from pipeline import durable
from pipeline.contract import JOB_NAME, JOB_STATE_NAME, PROGRESS_NAME, SPEC_NAME, StepSpec
from tests.daemon.dispatch.scripted_house import House
from tests.made_artifacts import made_spec
from tests.slurm.cluster import wait_for


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
    job = house.cluster / "jobs/1"
    house.wait_until(lambda: "JobHeldUser" not in job.read_text())  # `released` is written first
    job.unlink()
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


def test_the_number_of_a_submitted_job_is_the_last_line_of_what_sbatch_says() -> None:
    assert job_number("Welcome, says a site's wrapper\n7;cluster\n") == 7
    for said in ("²", "7" * 5000):
        with pytest.raises(CannotAsk, match="said no job's number"):
            job_number(said)


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


def test_a_job_waits_since_it_was_first_seen_to_wait_whatever_for(tmp_path: Path) -> None:
    spec = made_spec(tmp_path, "train")
    state = tmp_path / spec.folder / JOB_STATE_NAME
    state.parent.mkdir(parents=True)

    def since(told: str, reason: str, nodes: str = "") -> object:
        note_state(spec, Job(7, spec.key, spec.fence, told, reason, nodes))
        return durable.read_object(state)["since"]

    since("PENDING", "Resources")
    durable.write_hint(state, {**durable.read_object(state), "since": 1})
    assert since("PENDING", "Priority") == 1
    assert since("RUNNING", "None", "n2") != 1
