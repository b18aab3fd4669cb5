"""Each state of a run and its attempt x `dropforge cancel`: the run ends, on this machine and on a cluster."""

import shutil
from collections.abc import Callable

import pytest

from daemon.queue import run_queue, states
from daemon.queue.attempt_ends import Then
from daemon.state.run_files import open_jobs
from daemon.state.states import AWAITING, RunState
from pipeline import durable
from pipeline.contract import CLAIM_NAME, JOB_NAME, RESULT_NAME, REVOKED_NAME, SPEC_NAME
from pipeline.errors import DropforgeError
from tests import run_owner
from tests.daemon.dispatch.scripted_house import House
from tests.daemon.dispatch.test_dispatcher import NOW, Box, run_row, with_gate


def _in_no_hands(house: House) -> states.Claim:
    """Let the run be claimed by a daemon that dies before it begins a step."""
    held = run_owner.claim(house.engine, NOW, run_owner.configure)
    assert held is not None
    return held


def _queued(_house: House) -> None:
    pass


def _waits(house: House) -> None:
    run_owner.leave(house.engine, _in_no_hands(house), NOW, Then.RETRY, error="it failed")


def _claimed(house: House) -> None:
    _in_no_hands(house)
    house.again()


def _without_folder(house: House) -> None:
    house.prepare()
    shutil.rmtree(house.attempt)
    house.again()


def _without_spec(*names: str) -> Callable[[House], None]:
    def arrange(house: House) -> None:
        house.prepare()
        for path in house.attempt.iterdir():
            path.unlink()
        for name in names:
            (house.attempt / name).write_text("{}")
        house.again()

    return arrange


def _submitted(house: House) -> None:
    house.submit()


def _folder_gone(house: House) -> None:
    house.submit()
    shutil.rmtree(house.attempt)


def _is_a_file(house: House) -> None:
    house.submit()
    shutil.rmtree(house.attempt)
    house.attempt.write_text("")


def _runs_folder_is_a_file(house: House) -> None:
    house.submit()
    shutil.rmtree(house.root / "runs/1")
    (house.root / "runs/1").write_text("")


def _with(name: str, content: str | None, *further: str) -> Callable[[House], None]:
    """Damage a file of a submitted attempt: its new content, or `None` for a folder; `further` files are there, too."""

    def arrange(house: House) -> None:
        house.submit()
        for one in further:
            (house.attempt / one).write_text("{}")
        (house.attempt / name).unlink(missing_ok=True)
        if content is None:
            (house.attempt / name).mkdir()
        else:
            (house.attempt / name).write_text(content)

    return arrange


def _another_result(house: House) -> None:
    """Let a daemon start whose first look at the submitted attempt finds another one's result."""
    _with(RESULT_NAME, '{"key": "k", "fence": "f", "status": "ok", "exit_code": 0}')(house)
    house.again()


def _another_spec(house: House) -> None:
    spec = house.submit()
    durable.write_json(house.attempt / SPEC_NAME, spec.model_copy(update={"fence": "another"}).model_dump(mode="json"))


def _held(house: House) -> None:
    if house.cluster is not None:
        (house.cluster / "held").write_text("JobHeldAdmin")
    house.submit()


def _silent(house: House) -> None:
    house.submit()
    if house.cluster is not None:
        (house.cluster / "silent").touch()


def _silent_and_begun(house: House) -> None:
    _silent(house)
    (house.attempt / CLAIM_NAME).write_text("{}")


def _worker_died(house: House) -> None:
    """The worker took the order and died."""
    house.submit()
    if house.cluster is None:
        (house.attempt / CLAIM_NAME).write_text("{}")
        (house.attempt / "log.txt").touch()


STATES: dict[str, Callable[[House], object]] = {
    "queued": _queued,
    "waits for its next try": _waits,
    "claimed, no step begun": _claimed,
    "attempt without folder": _without_folder,
    "attempt with an empty folder": _without_spec(),
    "result without spec": _without_spec(RESULT_NAME),
    "claim without spec": _without_spec(CLAIM_NAME),
    "job without spec": _without_spec(JOB_NAME),
    "spec is damaged": _without_spec(SPEC_NAME),
    "submitted": _submitted,
    "job held by the administrator": _held,
    "Slurm is silent": _silent,
    "Slurm is silent, step begun": _silent_and_begun,
    "begun where nobody is": _with(CLAIM_NAME, "{}"),
    "worker died": _worker_died,
    "attempt's folder is gone": _folder_gone,
    "attempt's folder is a file": _is_a_file,
    "run's folder is a file": _runs_folder_is_a_file,
    "spec is no JSON": _with(SPEC_NAME, "{"),
    "spec is a folder": _with(SPEC_NAME, None),
    "spec of another attempt": _another_spec,
    "revocation is no JSON": _with(REVOKED_NAME, ""),
    "revocation is no JSON, step begun": _with(REVOKED_NAME, "", CLAIM_NAME),
    "revocation is a list": _with(REVOKED_NAME, "[]"),
    "revocation is a folder": _with(REVOKED_NAME, None),
    "claim is a folder": _with(CLAIM_NAME, None),
    "job is no JSON": _with(JOB_NAME, "{"),
    "job is a folder": _with(JOB_NAME, None),
    "result is no JSON": _with(RESULT_NAME, "{"),
    "result is a folder": _with(RESULT_NAME, None),
    "result of another attempt": _another_result,
    "artifact is no JSON": lambda house: (house.submit(), (house.root / "runs/1/prepare.json").write_text("{")),
}


@pytest.mark.parametrize("name", STATES)
def test_a_run_in_any_state_ends_by_cancel(house: House, name: str) -> None:
    STATES[name](house)
    run_queue.cancel(house.engine, 1, NOW)
    house.wait_until(lambda: run_row(house.engine).state == RunState.CANCELLED)
    if name == "submitted" or name.startswith("revocation"):
        assert (house.attempt / CLAIM_NAME).exists(), "nobody begins it any more"
    if house.cluster is not None and "silent" not in name:
        house.wait_until(lambda: house.jobs() == [])
    if house.cluster is not None:
        assert open_jobs(house.root) == [], "else the daemon would refuse other settings of the executor for good"


@pytest.mark.parametrize("name", ["result without spec", "claim without spec", "job without spec", "spec is damaged"])
def test_an_attempt_whose_spec_is_lost_or_damaged_is_followed_by_another_one(house: House, name: str) -> None:
    STATES[name](house)
    house.wait_until((house.attempt.with_name("train-2") / SPEC_NAME).exists)
    assert (run_row(house.engine).failures, run_row(house.engine).deaths) == (0, name == "spec is damaged")


def test_a_win_that_waits_for_approval_is_refused_by_cancel(box: Box) -> None:
    box.settings = with_gate(box.settings, approval="manual")
    box.drop("a")
    box.ticks()
    assert box.run().outcome == AWAITING
    run_queue.cancel(box.engine, 1, NOW)
    assert (box.run().state, box.run().outcome) == (RunState.CANCELLED, None)
    with pytest.raises(DropforgeError, match="has ended already: cancelled"):
        run_queue.cancel(box.engine, 1, NOW)
