"""Evaluation by vLLM: a stand-in program that answers as it should, and in every way that it should not."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.artifacts import Evaluation
from pipeline.config import EvaluateConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted, StepFailed
from pipeline.evaluate import vllm
from pipeline.evaluate.prediction_cache import read_values
from pipeline.evaluate.step import evaluate
from tests.pipeline.evaluate.test_step import RECORDS, Bench, heldout_rows
from tests.records_made import write_lines
from tests.stand_in_vllm import LIVES, VERSION, install

Make = Callable[..., Attempt]


@pytest.fixture
def attempt(tmp_path: Path, make_attempt: Make, tiny: Any, tiny_llama: Path) -> Make:
    """A factory of attempts of one run: attempt("killed", batch_size=1), with a program that behaves so."""
    tiny.make_model(tmp_path / "candidate", seed=1)
    bench = Bench(tmp_path, make_attempt, tiny_llama, tmp_path / "candidate")
    choices = ["yes", "no", "maybe so"]
    items = [{"id": f"q{n}", "question": f"Which {n}?", "choices": choices, "answer": n} for n in range(3)]
    write_lines(tmp_path / "suite.jsonl", items)

    def make(behaviour: str, **settings: Any) -> Attempt:
        program = install(tmp_path / "vllm", behaviour)
        return bench.attempt(heldout_rows(), **{"vllm": program, "batch_size": 2, **settings})

    return make


def used(attempt: Attempt, report: Evaluation, role: str) -> dict[str, Any]:
    return read_values([attempt.folder / f"predictions/{report.prediction_keys[role]}.jsonl"])


def started(folder: Path) -> list[int]:
    """Return the processes that a stand-in left the numbers of: itself and its worker."""
    path = folder / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def wait_until_gone(pids: list[int]) -> None:
    """Wait until none of the processes lives; the test's own time limit ends a wait in vain."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid)) as process:
            select.select([process], [], [])


def failure(attempt: Attempt) -> DropforgeError:
    """Return how an evaluation fails; nothing of vLLM may be left."""
    with pytest.raises(DropforgeError) as caught:
        evaluate(attempt)
    wait_until_gone(started(attempt.folder))
    return caught.value


def test_it_answers_and_weighs_as_transformers_does_under_a_key_of_its_own(attempt: Make, tmp_path: Path) -> None:
    general = (str(tmp_path / "suite.jsonl"),)
    asked = attempt("model", general=general, repetition_penalty=1.4)
    plain = attempt("model", general=general, repetition_penalty=1.4, vllm="")
    reports = evaluate(asked), evaluate(plain)
    assert reports[0].versions["engine"] == f"vllm {VERSION}"
    for role in ("cand", asked.config.base_model_id):
        one, two = used(asked, reports[0], role), used(plain, reports[1], role)
        assert list(one) == list(two)
        for given, expected in zip(one.values(), two.values(), strict=True):
            assert given == (expected if isinstance(expected[0], str) else pytest.approx(expected, rel=1e-4))
        assert reports[0].prediction_keys[role] != reports[1].prediction_keys[role]
    assert reports[0].setup != reports[1].setup
    assert reports[0].suites == reports[1].suites
    assert reports[0].suites[0].records == 3
    pids = started(asked.folder)
    assert len(pids) == 2 * 2, "a process and its worker for one model after the other"
    wait_until_gone(pids)


REFUSED = {
    "dies": (StepFailed, "vLLM exited: .*no room for the cache of keys and values"),
    "hangs": (StepFailed, "vLLM gave no answer within 1 s"),
    "short": (StepFailed, "an answer of 1 token that neither ended nor reached 6"),
    "no number": (CannotTrain, "a likelihood of the candidate is not a finite number"),
    "broken": (CannotTrain, r"/vllm is not vLLM's: PackageNotFoundError"),
    "gone": (CannotTrain, "vLLM's Python cannot be run: .*No such file or directory: '/.*/python3'"),
}


@pytest.mark.parametrize(("behaviour", "expected"), REFUSED.items(), ids=REFUSED)
def test_what_vllm_does_wrong_fails_the_step_with_the_reason_and_leaves_nothing_behind(
    attempt: Make, behaviour: str, expected: tuple[type[DropforgeError], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = attempt(behaviour)
    if behaviour == "hangs":
        monkeypatch.setattr(vllm, "REPLY_SECONDS", 1.0)
    if behaviour == "gone":
        Path(made.config.evaluate.vllm).with_name("python3").unlink()
    error = failure(made)
    with pytest.raises(expected[0], match=expected[1]):
        raise error
    assert 'evaluate.vllm = ""' in error.hint or "retry" in error.hint or "train again" in error.hint


def test_the_program_may_be_a_link_into_the_environment(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "link").symlink_to(install(tmp_path / "bin/vllm", "fixed"))
    assert vllm.read_version(str(tmp_path / "link")) == VERSION


def test_a_vllm_killed_in_the_middle_costs_what_was_in_hand_and_the_next_attempt_resumes(
    attempt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.greedy_decoding._PER_ROW", 1)
    first = attempt("killed")
    assert LIVES > RECORDS, "all likelihoods, and some answers"
    assert "vLLM exited" in failure(first).message
    second = attempt("fixed")
    assert evaluate(second).candidate.generated == RECORDS
    lines = [path.read_bytes().count(b"\n") for path in second.folder.glob("predictions/*.jsonl")]
    batches = [1 + RECORDS - LIVES // 2, RECORDS]
    assert sorted(lines) == batches, "a line for what was there, then batches of two, of likelihoods or answers"


def test_a_step_that_is_to_stop_stops_vllm(attempt: Make) -> None:
    made = attempt("silent")
    ask = vllm.Process.ask

    def stop_and_ask(process: vllm.Process, request: Any) -> Any:
        if isinstance(request, list):
            made.stop.set()
        return ask(process, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.Process, "ask", stop_and_ask)
        assert isinstance(failure(made), Interrupted)
    assert len(started(made.folder)) == 2


def test_a_step_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.evaluate.vllm import Process; "
        "arguments = {'model': 'm', 'generation_config': 'vllm', 'kv_cache_memory_bytes': 1}; "
        "Process(sys.argv[1], arguments, Path(sys.argv[2]), lambda: None)"
    )
    program = install(tmp_path / "vllm", "hangs")
    step = subprocess.Popen([sys.executable, "-c", code, program, str(tmp_path / "log")])
    try:
        while not (pids := started(tmp_path)):
            assert step.poll() is None
            time.sleep(0.05)
    finally:
        step.send_signal(signal.SIGKILL)
        step.wait()
    assert len(pids) == 2
    wait_until_gone(pids)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"evaluate\.vllm must be the absolute path"):
        EvaluateConfig(vllm="bin/vllm")
