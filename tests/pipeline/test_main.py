"""`python -m pipeline STEP SPEC` as the worker runs it: a real process and its result."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Dataset, Drop
from pipeline.config import RunConfig
from pipeline.contract import CURVE_NAME, PROGRESS_NAME, RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from tests.made_artifacts import dataset_of, made_spec
from tests.model_folder import write_model


def write_spec(root: Path, step: str, rows: str) -> StepSpec:
    (root / "drops").mkdir()
    (root / "drops" / "a.jsonl").write_text(rows)
    digest = hashlib.sha256(rows.encode()).hexdigest()
    drop = Drop(id=1, sha256=digest, name="a.jsonl", path="drops/a.jsonl", role="train", rows=1, records=1)
    spec = made_spec(root, step, drops=(drop,))
    (root / spec.folder).mkdir(parents=True)
    durable.write_json(root / spec.folder / SPEC_NAME, spec.model_dump(mode="json"))
    return spec


def run(spec: StepSpec, lifeline: int | None = None) -> subprocess.CompletedProcess[str]:
    path = Path(spec.root) / spec.folder / SPEC_NAME
    environment = {**os.environ, **({"DROPFORGE_LIFELINE_FD": str(lifeline)} if lifeline is not None else {})}
    return subprocess.run(
        [sys.executable, "-P", "-m", "pipeline", spec.step, str(path)],
        env=environment,
        pass_fds=() if lifeline is None else (lifeline,),
        text=True,
        capture_output=True,
        check=False,
    )


def result_of(spec: StepSpec) -> StepResult:
    return StepResult.model_validate(durable.read_json(Path(spec.root) / spec.folder / RESULT_NAME))


ROWS = "".join(f'{{"instruction": "say {n}", "output": "{n}"}}\n' for n in range(50))


def test_a_good_step_leaves_its_artifact_and_the_hashes_of_its_files(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "prepare", ROWS)
    (tmp_path / spec.folder / CURVE_NAME).write_text("{}")
    argv = [sys.executable, "-P", "-m", "pipeline", spec.step, str(tmp_path / spec.folder / SPEC_NAME)]
    subprocess.run(argv, check=True, capture_output=True)
    result = result_of(spec)
    assert (result.status, result.key, result.fence) == ("ok", "1-prepare-1", "fence")
    dataset = Dataset.model_validate(result.artifact)
    assert dataset.train_rows + dataset.dev_rows + dataset.heldout_rows == 50
    for name, digest in result.outputs.items():
        assert durable.sha256_file(tmp_path / spec.folder / name) == digest
    assert durable.read_json(tmp_path / spec.folder / PROGRESS_NAME)["step"] == "prepare"
    assert not {CURVE_NAME, PROGRESS_NAME} & set(result.outputs), "they are rewritten until the process ends"


def test_a_step_that_lacks_its_input_fails_in_words_and_without_a_traceback(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "decide", ROWS)
    done = run(spec)
    result = result_of(spec)
    assert (done.returncode, result.status, result.exit_code) == (1, "failed", 1)
    assert result.error is not None
    assert "prepare" in result.error.message
    assert result.error.hint
    assert "Traceback" not in done.stderr


def test_an_output_that_cannot_be_read_is_an_error_in_the_result(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "prepare", ROWS)
    # A regular file to which each read is an I/O error.
    (tmp_path / spec.folder / "odd").symlink_to("/proc/self/mem")
    run(spec)
    result = result_of(spec)
    assert (result.status, result.exit_code, result.error is not None) == ("failed", 70, True)


def test_the_hint_of_a_step_names_its_run(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_model(base, b"w" * 8)
    config = RunConfig(track="default", base_model=str(base), base_model_id="another", salt="s")
    spec = made_spec(tmp_path, "train", config, run=7, inputs={"prepare": "prepare.json"})
    (tmp_path / spec.folder).mkdir(parents=True)
    durable.write_json(tmp_path / "prepare.json", dataset_of(100).model_dump(mode="json"))
    durable.write_json(tmp_path / spec.folder / SPEC_NAME, spec.model_dump(mode="json"))
    done = run(spec)
    error = result_of(spec).error
    assert error is not None
    assert "has changed since the run began" in error.message
    assert error.hint.endswith("dropforge retry 7")
    assert error.hint in done.stderr


def test_data_that_cannot_be_trained_ends_with_65(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "prepare", "")
    assert run(spec).returncode == 65
    assert result_of(spec).exit_code == 65


def test_a_step_whose_worker_died_before_it_was_written_down_does_nothing(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "prepare", ROWS)
    reader, writer = os.pipe()
    os.close(writer)
    done = run(spec, reader)
    os.close(reader)
    assert done.returncode == 75
    assert not (tmp_path / spec.folder / RESULT_NAME).exists()
