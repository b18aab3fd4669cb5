"""Evaluation by vLLM: a stand-in program that answers as it should, and in every way that it should not."""

import contextlib
import json
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

from pipeline.artifacts import Dataset, Evaluation, Model, ModelRef, NoiseFloor
from pipeline.config import EvaluateConfig, RunConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, DropforgeError, Interrupted, StepFailed
from pipeline.evaluate.engines import vllm_server
from pipeline.evaluate.prediction_cache import Prediction
from pipeline.evaluate.step import evaluate
from pipeline.models.manifest import model_id
from tests.made_artifacts import heldout_row
from tests.stand_in_vllm import LIVES, VERSION, install

RECORDS = 10
NEW_TOKENS = 8
Make = Callable[..., Attempt]


@pytest.fixture
def attempt(tmp_path: Path, make_attempt: Make, tiny: Any, tiny_llama: Path) -> Make:
    """A factory of attempts of one run: attempt("killed", batch_size=1), with a program that behaves so."""
    tiny.make_model(tmp_path / "models/candidate", seed=1)
    (tmp_path / "dataset").mkdir()
    rows = [heldout_row(f"{place:08x}", row) for place, row in enumerate(tiny.rows(RECORDS, seed=5))]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "dataset/heldout.jsonl").write_text(text, encoding="utf-8")
    choices = ["yes", "no", "maybe so"]
    items = [{"id": f"q{n}", "question": f"Which {n}?", "choices": choices, "answer": n} for n in range(3)]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    base_id = model_id(tiny_llama)

    def make(behaviour: str, **settings: Any) -> Attempt:
        dataset = Dataset(
            folder="dataset",
            train_rows=1,
            dev_rows=0,
            heldout_rows=RECORDS,
            heldout_groups=RECORDS,
            heldout_pinned=True,
            heldout_version="v",
            dataset_sha256="d",
            duplicates=0,
            replaced=0,
            removed_heldout=0,
            metric="exact_match",
            max_new_tokens=NEW_TOKENS,
        )
        model = Model.model_validate(
            {
                "folder": "models/candidate",
                "model_id": "cand",
                "base_model_id": base_id,
                "dtype": "float32",
                "size_bytes": 1,
                "format": "chat",
                "seconds": 1.0,
            }
        )
        program = install(tmp_path / "vllm", behaviour)
        evaluation = {"vllm": program, "batch_size": 2, "general": (), **settings}
        config = RunConfig(
            track="default",
            base_model=str(tiny_llama),
            base_model_id=base_id,
            salt="s",
            noise=NoiseFloor(records=1, changed=0, points=0.0),
            evaluate=EvaluateConfig(**evaluation),
        )
        made = make_attempt("evaluate", config=config, inputs={"prepare": dataset, "merge": model})
        champion = ModelRef(model_id=base_id, path=str(tiny_llama), generation=0)
        return Attempt(made.spec.model_copy(update={"champion": champion}))

    return make


def used(attempt: Attempt, report: Evaluation, role: str) -> list[dict[str, Any]]:
    text = (attempt.folder / f"predictions/{report.prediction_keys[role]}.jsonl").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith('{"suite"')]
    return [Prediction.model_validate_json(line).model_dump(exclude={"seconds"}) for line in lines]


def started(folder: Path) -> list[int]:
    """Return the processes that a stand-in left the numbers of: its guard, itself and its worker."""
    return [int(pid) for path in folder.glob("vllm-*/pids") for pid in path.read_text().split()]


def living(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def failure(attempt: Attempt) -> DropforgeError:
    """Return how an evaluation fails; nothing of vLLM may be left."""
    with pytest.raises(DropforgeError) as caught:
        evaluate(attempt)
    assert living(started(attempt.folder)) == []
    return caught.value


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_it_answers_and_weighs_as_transformers_does_under_a_key_of_its_own(
    attempt: Make, tmp_path: Path, penalty: float
) -> None:
    general = (str(tmp_path / "suite.jsonl"),)
    asked = attempt("model", general=general, repetition_penalty=penalty)
    plain = attempt("model", general=general, repetition_penalty=penalty, vllm="")
    reports = evaluate(asked), evaluate(plain)
    assert reports[0].versions["engine"] == f"vllm {VERSION}"
    for role in ("cand", asked.config.base_model_id):
        for one, two in zip(used(asked, reports[0], role), used(plain, reports[1], role), strict=True):
            assert one.pop("nll_sum") == pytest.approx(two.pop("nll_sum"), rel=1e-4)
            assert one == two
        assert reports[0].prediction_keys[role] != reports[1].prediction_keys[role]
    assert reports[0].suites == reports[1].suites
    assert reports[0].suites[0].records == 3
    pids = started(asked.folder)
    assert len(pids) == 2 * 3, "guard, server and worker for one model after the other"
    assert living(pids) == []


REFUSED = {
    "dies": (StepFailed, "vLLM exited before it was ready: .*no room for the cache of keys and values"),
    "hangs": (StepFailed, "vLLM was not ready within 2 s"),
    "silent": (StepFailed, "vLLM gave no answer within 2 s"),
    "short": (StepFailed, "an answer of 1 token that neither ended nor reached 8"),
    "another model": (StepFailed, "vLLM serves .'another'. instead of cand"),
    "another prompt": (StepFailed, "vLLM answered another prompt"),
    "fewer likelihoods": (StepFailed, r"vLLM gave \d+ log-probabilities for \d+ tokens"),
    "no number": (CannotTrain, "the candidate's likelihood of record .* is not a finite number"),
    "refuses": (StepFailed, "vLLM refused a request with status 500"),
    "killed": (StepFailed, r"vLLM stopped answering \(\w+\)"),
    "broken": (CannotTrain, r"--version exited with 1: ImportError: libcudart"),
}


@pytest.mark.parametrize(("behaviour", "expected"), REFUSED.items(), ids=REFUSED)
def test_what_vllm_does_wrong_fails_the_step_with_the_reason_and_leaves_nothing_behind(
    attempt: Make, behaviour: str, expected: tuple[type[DropforgeError], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if behaviour in {"hangs", "silent"}:
        # Long enough for a stand-in, and for nothing else.
        monkeypatch.setattr(vllm_server, "START_SECONDS" if behaviour == "hangs" else "ANSWER_SECONDS", 2.0)
    error = failure(attempt(behaviour))
    with pytest.raises(expected[0], match=expected[1]):
        raise error
    assert error.hint


def test_a_program_that_is_not_there_is_named(attempt: Make) -> None:
    made = attempt("fixed")
    Path(made.config.evaluate.vllm).unlink()
    with pytest.raises(CannotTrain, match=r"vLLM cannot be started: /.*/vllm: No such file") as caught:
        evaluate(made)
    assert 'evaluate.vllm = ""' in caught.value.hint


@pytest.mark.parametrize("place", ["env/bin/vllm", "a link"])
def test_its_version_is_read_where_it_is_installed_and_the_slow_program_not_asked(tmp_path: Path, place: str) -> None:
    program = tmp_path / "env/bin/vllm"
    program.parent.mkdir(parents=True)
    install(program, "broken")
    package = tmp_path / "env/lib/python3.12/site-packages/vllm-0.11.2+cpu.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm\nVersion: 0.11.2+cpu\n")
    (package / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n")
    (tmp_path / "a link").symlink_to(program)
    assert vllm_server.read_version(str(tmp_path / place)) == "0.11.2+cpu"
    other = program.with_name("python")
    program.rename(other)
    with pytest.raises(CannotTrain, match="--version exited with 1"):
        vllm_server.read_version(str(other))  # in the same environment, and not vLLM


def test_a_vllm_killed_in_the_middle_costs_what_was_in_hand_and_the_next_attempt_goes_on(
    attempt: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.greedy_decoding._PER_ROW", 1)
    first = attempt("killed")
    assert LIVES > RECORDS, "all likelihoods, and some answers"
    assert "vLLM stopped answering" in failure(first).message
    second = attempt("fixed")
    report = evaluate(second)
    assert 0 < report.candidate.resumed < RECORDS
    assert report.candidate.generated == RECORDS
    assert "answers come from an interrupted attempt" in capsys.readouterr().err


def test_a_step_that_is_to_stop_stops_vllm(attempt: Make) -> None:
    made = attempt("silent")
    asked = vllm_server.Server.complete

    def complete(server: Any, request: Any) -> Any:
        made.stop.set()
        return asked(server, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_server.Server, "complete", complete)
        assert isinstance(failure(made), Interrupted)
    assert len(started(made.folder)) == 3


def test_a_step_that_is_killed_leaves_no_process_behind(attempt: Make) -> None:
    made = attempt("silent")
    spec = made.folder / "spec.json"
    spec.write_text(made.spec.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from pipeline.contract import Attempt, StepSpec; "
        "from pipeline.evaluate.step import evaluate; "
        "evaluate(Attempt(StepSpec.model_validate_json(Path(sys.argv[1]).read_text())))"
    )
    step = subprocess.Popen([sys.executable, "-c", program, str(spec)], env=os.environ)
    try:
        while not (pids := started(made.folder)):
            assert step.poll() is None
            time.sleep(0.05)
    finally:
        step.send_signal(signal.SIGKILL)
        step.wait()
    assert len(pids) == 3
    for pid in pids:
        with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid)) as process:
            select.select([process], [], [])  # the test's own time limit ends a wait in vain
    assert living(pids) == []


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"evaluate\.vllm must be the absolute path"):
        EvaluateConfig(vllm="bin/vllm")
    with pytest.raises(ValidationError, match="lm-eval:arc_easy needs transformers"):
        EvaluateConfig(vllm="/opt/vllm/bin/vllm", general=("lm-eval:arc_easy",))
