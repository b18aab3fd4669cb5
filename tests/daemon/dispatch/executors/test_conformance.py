"""What both executors do alike: the local one with its worker, and Slurm's with a real cluster on this machine."""

import pytest

from daemon.dispatch.spool import JobState
from pipeline.contract import LOG_NAME, RESULT_NAME
from pipeline.models.untrusted import ENDED_BY
from tests.daemon.dispatch.executors.conftest import House
from tests.daemon.dispatch.test_worker import DEAF, GOOD, KILLED, PRELUDE, UNTIL_TERM, result_of, spec_of
from tests.slurm.cluster import wait_for

BUSY = (
    "step train was ended: the tokenizer or the chat template of m took more than 120 s of the processor, to load or "
    "for one record; mend tokenizer.json and chat_template.jinja"
)
TWICE = PRELUDE + "marks = pathlib.Path('../marks'); marks.open('a').write('begun\\n'); result('ok', 0)"


def test_an_attempt_that_is_ordered_twice_runs_once_and_its_result_stays(house: House) -> None:
    spec = spec_of(house.root, TWICE)
    for _ in range(2):
        house.executor.submit(spec)
    house.wait_until(spec, JobState.ENDED)
    house.executor.submit(spec)
    assert house.executor.poll(spec) is JobState.ENDED
    assert result_of(spec).status == "ok"
    assert (house.root / spec.folder / "../marks").read_text() == "begun\n"


def test_a_new_daemon_stops_a_step_that_it_has_not_asked_about_yet(house: House) -> None:
    spec = spec_of(house.root, UNTIL_TERM)
    house.executor.submit(spec)
    wait_for((house.root / spec.folder / "said").exists)
    house.again()
    house.executor.cancel(spec.key)
    wait_for((house.root / spec.folder / RESULT_NAME).exists)
    assert result_of(spec).status == "interrupted"


def test_the_cancel_of_an_attempt_that_has_ended_changes_nothing(house: House) -> None:
    spec = spec_of(house.root, GOOD)
    house.executor.submit(spec)
    wait_for((house.root / spec.folder / RESULT_NAME).exists)
    for _ in range(2):
        house.executor.cancel(spec.key)
        house.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "ok"


def test_a_step_that_does_not_stop_is_killed(house: House) -> None:
    spec = spec_of(house.root, DEAF, grace=0.5)
    house.executor.submit(spec)
    wait_for((house.root / spec.folder / "said").exists)
    house.executor.cancel(spec.key)
    house.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"


@pytest.mark.parametrize(
    ("script", "status", "code", "words"),
    [
        (KILLED.replace("{}", "9"), "failed", 137, "step train was killed by SIGKILL"),
        (KILLED.replace("{}", str(int(ENDED_BY))), "failed", 65, BUSY),
        ("raise SystemExit(0)", "failed", 1, "step train ended with exit code 0 and left no result"),
        ("raise SystemExit(65)", "failed", 65, "step train ended with exit code 65 and left no result"),
        ("raise SystemExit(74)", "failed", 74, "the disk of"),
        ("raise SystemExit(75)", "interrupted", 75, ""),
    ],
)
def test_a_step_that_leaves_no_result_gets_one_with_the_reason(
    house: House, script: str, status: str, code: int, words: str
) -> None:
    spec = spec_of(house.root, script)
    house.executor.submit(spec)
    house.wait_until(spec, JobState.ENDED)
    result = result_of(spec)
    assert (result.status, result.exit_code) == (status, code)
    assert (f"{result.error.message}; {result.error.hint}" if result.error else "").startswith(words)


def test_what_a_step_prints_is_in_its_log_while_it_runs_and_a_new_daemon_finds_it(house: House) -> None:
    spec = spec_of(house.root, PRELUDE + "print('seen', flush=True)\n" + UNTIL_TERM.removeprefix(PRELUDE))
    house.executor.submit(spec)
    log = house.root / spec.folder / LOG_NAME
    wait_for(lambda: log.exists() and "seen" in log.read_text())
    house.again()
    house.wait_until(spec, JobState.RUNNING)
    for _ in range(2):
        house.executor.cancel(spec.key)
    house.wait_until(spec, JobState.ENDED)
    assert result_of(spec).status == "interrupted"


def test_a_step_sees_no_secret_of_the_daemons(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    spec = spec_of(house.root, GOOD)
    house.executor.submit(spec)
    house.wait_until(spec, JobState.ENDED)
    assert (house.root / spec.folder / "said").read_text() == "none"
