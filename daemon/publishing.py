"""
Checks what an attempt left and publishes it: `runs/<id>/<step>.json` present means that the step is done.

Everything here is idempotent: after a crash in the middle the same result is published again to the same end.
"""

import os
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Artifact, Dataset, Model, Report, Verdict
from pipeline.contract import RESULT_NAME, SPEC_NAME, StepResult, StepSpec
from pipeline.errors import StepFailed
from pipeline.steps import BY_NAME, STEPS


def run_folder(state_folder: Path, run_id: int) -> Path:
    """Return the folder of a run."""
    return state_folder / "runs" / str(run_id)


def attempt_folder(run_id: int, step: str, number: int) -> str:
    """Return an attempt's folder, relative to the state folder."""
    return f"runs/{run_id}/attempts/{step}-{number}"


def published(state_folder: Path, run_id: int) -> dict[str, str]:
    """Return the run's published artifacts: step name → path relative to the state folder."""
    folder = run_folder(state_folder, run_id)
    names = [step.name for step in STEPS if (folder / f"{step.name}.json").exists()]
    return {name: f"runs/{run_id}/{name}.json" for name in names}


def load_dataset(state_folder: Path, run_id: int) -> Dataset | None:
    """Return what `prepare` made of the run's snapshot, if it is published."""
    value = durable.read_json(run_folder(state_folder, run_id) / "prepare.json")
    return None if value is None else Dataset.model_validate(value)


def load_verdict(state_folder: Path, run_id: int) -> Verdict | None:
    """Return the run's verdict, if it is published."""
    value = durable.read_json(run_folder(state_folder, run_id) / "decide.json")
    return None if value is None else Verdict.model_validate(value)


def remove_leftovers(state_folder: Path, run_id: int) -> None:
    """Remove what a dead daemon left half-written of a run; its steps' own files are left alone, they may be alive."""
    folder = run_folder(state_folder, run_id)
    durable.remove_leftovers(folder)
    for attempt in (folder / "attempts").glob("*"):
        durable.remove_leftovers(attempt, SPEC_NAME)


def read_result(spec: StepSpec) -> StepResult | None:
    """Return the attempt's result; `None` if it is not there or carries another attempt's fence."""
    value = durable.read_json(Path(spec.root) / spec.folder / RESULT_NAME)
    if value is None:
        return None
    result = StepResult.model_validate(value)
    return result if (result.key, result.fence) == (spec.key, spec.fence) else None


def publish(spec: StepSpec, result: StepResult) -> Artifact:
    """
    Check a good result and publish its artifact.

    Raises `StepFailed` if the artifact is malformed or a file that it names is not there.
    """
    root = Path(spec.root)
    try:
        artifact: Artifact = BY_NAME[spec.step].writes.model_validate(result.artifact)
    except ValueError as error:
        message = f"step {spec.step} left a malformed artifact: {error}"
        raise StepFailed(message, f"the whole story: dropforge logs {spec.run}") from error
    if isinstance(artifact, Model):
        artifact = _publish_model(root, artifact)
    else:
        missing = [name for name in result.outputs if not (root / spec.folder / name).is_file()]
        if missing:
            message = f"step {spec.step} named files that are not there: {', '.join(missing[:3])}"
            raise StepFailed(message, f"retry the run: dropforge retry {spec.run}")
    if isinstance(artifact, Report):
        _keep_predictions(root, spec, artifact)
    durable.write_json(run_folder(root, spec.run) / f"{spec.step}.json", artifact.model_dump(mode="json"))
    return artifact


def unpublish(state_folder: Path, run_id: int, step: str) -> None:
    """Take a step's artifact back, so that the step is done again; the old one stays under a numbered name."""
    folder = run_folder(state_folder, run_id)
    number = 1
    while (folder / f"{step}.stale-{number}.json").exists():
        number += 1
    (folder / f"{step}.json").rename(folder / f"{step}.stale-{number}.json")
    durable.fsync_folder(folder)


def _publish_model(root: Path, model: Model) -> Model:
    """Move the merged model to its content-addressed place."""
    target = root / "models" / model.model_id
    target.parent.mkdir(exist_ok=True)
    source = root / model.folder
    if source.is_dir() and source != target:
        durable.publish_folder(source, target)
    if not target.is_dir():
        message = f"the merged model is not there: {model.folder}"
        raise StepFailed(message, "retry the run; its log says how the merge ended")
    return model.model_copy(update={"folder": f"models/{model.model_id}"})


def _keep_predictions(root: Path, spec: StepSpec, report: Report) -> None:
    """Put the predictions into the cache, a file an attempt, so that a champion is never paid for twice."""
    for key in sorted(set(report.prediction_keys.values())):
        source = root / spec.folder / "predictions" / f"{key}.jsonl"
        folder = root / spec.predictions / key
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{spec.key}.jsonl"
        if source.is_file() and not target.exists():
            os.link(source, target)
            durable.fsync_folder(folder)
            durable.fsync_folder(folder.parent)
