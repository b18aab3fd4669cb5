"""
Check an attempt's result and publish it: a step is done if `runs/<id>/<step>.json` exists.

Everything here is idempotent: after a crash in the middle the same result can be published again.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from daemon.system.folders import WorkFolder
from pipeline import durable
from pipeline.artifacts import Adapter, Artifact, Dataset, Evaluation, Model, Verdict
from pipeline.contract import (
    CLAIM_NAME,
    CURVE_NAME,
    JOB_NAME,
    JOB_STATE_NAME,
    PROGRESS_NAME,
    RESULT_NAME,
    REVOKED_NAME,
    SPEC_NAME,
    Curve,
    Progress,
    StepResult,
    StepSpec,
)
from pipeline.errors import DropforgeError, StepFailed
from pipeline.steps import BY_NAME, STEPS

#: Files in the checkpoint folder that show the progress of a training, or of the trials of a search.
_FURTHER = ("step-*/files.json", "trial-*/step-*/files.json", "trial-*/ended.json")
A = TypeVar("A", bound=Artifact)


class ArtifactDamaged(DropforgeError):
    """A published artifact of a run cannot be parsed as that of its step."""


def run_folder(work_folder: WorkFolder, run_id: int) -> Path:
    """Return the path of a run's folder, `runs/<run_id>` in the work folder, whether it exists or not."""
    return work_folder / "runs" / str(run_id)


def attempt_folder(run_id: int, step: str, number: int) -> str:
    """Return the path of an attempt's folder relative to the work folder: `runs/<run_id>/attempts/<step>-<number>`."""
    return f"runs/{run_id}/attempts/{step}-{number}"


def make_attempt_folder(spec: StepSpec) -> Path:
    """Return an attempt's folder, made if missing. Raises `OSError` without a folder `runs`, as under a lost mount."""
    folder = Path(spec.root) / spec.folder
    for place in (folder.parent.parent, folder.parent, folder):
        place.mkdir(exist_ok=True)
    return folder


def published(work_folder: WorkFolder, run_id: int) -> dict[str, str]:
    """Map each step that a run published, in order, to its artifact's path, relative to the work folder; read none."""
    folder = run_folder(work_folder, run_id)
    names = [step.name for step in STEPS if (folder / f"{step.name}.json").exists()]
    return {name: f"runs/{run_id}/{name}.json" for name in names}


def _loader(step: str, kind: type[A]) -> Callable[[WorkFolder, int], A | None]:
    """Return a function that returns what `step` of a run published, or `None`; `ArtifactDamaged` if malformed."""

    def load(work_folder: WorkFolder, run_id: int) -> A | None:
        path = run_folder(work_folder, run_id) / f"{step}.json"
        try:
            value = durable.read_json(path)
            return None if value is None else kind.model_validate(value)
        except ValueError as error:
            what = f"the verdict of run {run_id}" if step == "decide" else f"what step {step} of run {run_id} published"
            hint = (
                f"bring runs/{run_id}/{step}.json back from a backup; a run that did not succeed can do the step "
                f"again: dropforge retry {run_id} --from {step}"
            )
            raise ArtifactDamaged(f"{what} is damaged: {path}", hint) from error

    return load


#: Each returns what a step of a run published, or `None`, and raises `ArtifactDamaged` if that is malformed.
load_dataset = _loader("prepare", Dataset)
load_adapter = _loader("train", Adapter)
load_model = _loader("merge", Model)
load_evaluation = _loader("evaluate", Evaluation)
load_verdict = _loader("decide", Verdict)


def readable_dataset(work_folder: WorkFolder, run_id: int) -> Dataset | None:
    """Return a run's prepared data; `None` if there is none, or it is damaged or not readable."""
    with contextlib.suppress(ArtifactDamaged, OSError):
        return load_dataset(work_folder, run_id)
    return None


def load_progress(work_folder: WorkFolder, run_id: int, step: str, number: int) -> Progress | None:
    """
    Return the progress that attempt `number` at `step` last wrote, with where its job runs or why that waits.

    `None` if it has no job and its file is missing or unreadable.
    """
    folder = work_folder / attempt_folder(run_id, step, number)
    try:
        value = durable.read_json(folder / PROGRESS_NAME)
        made = None if value is None else Progress.model_validate(value)
    except (OSError, ValueError):
        made = None
    try:
        where = _job_words(durable.read_object(folder / JOB_STATE_NAME))
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        where = ""
    return (made or Progress(step=step)).model_copy(update={"where": where}) if where else made


def _job_words(job: Mapping[str, Any]) -> str:
    """Return where a job runs, that it has ended, or why it waits and since when; "" without its number."""
    if not job.get("job"):
        return ""
    if job.get("nodes"):
        return f"on {job['nodes']}" + ("" if job["state"] == "RUNNING" else f" ({job['state'].lower()})")
    if not job["state"].startswith(("PENDING", "REQUEUE")):
        return f"job {job['job']} has ended: {job['state'].lower()}"
    reason = f" ({job['reason']})" if job.get("reason") not in {None, "", "None"} else ""
    since, now = datetime.fromtimestamp(job.get("since", 0) / 1000).astimezone(), datetime.now().astimezone()
    form = "%H:%M" if since.date() == now.date() else "%Y-%m-%d %H:%M"
    return f"waits in Slurm{reason}, job {job['job']}, since {since:{form}}"


def stop_words(spec: StepSpec) -> str | None:
    """Return how Slurm ended an attempt's job, and from where its training goes on; `None` if a local worker ran it."""
    folder, checkpoints = Path(spec.root) / spec.folder, Path(spec.root) / spec.checkpoints
    claim, revoked = (durable.read_object(folder / name) for name in (CLAIM_NAME, REVOKED_NAME))
    if not claim.get("job"):
        return None
    words = f"Slurm stopped job {claim.get('job')} of step {spec.step} on {claim.get('node')}"
    words = str(revoked["error"]["message"]) if revoked else words
    steps = [int(path.parent.name.split("-")[1]) for path in checkpoints.glob("step-*/files.json")]
    return f"{words}; it goes on from step {max(steps)}" if steps and spec.step == "train" else words


def was_out_of_time(spec: StepSpec) -> bool:
    """Return whether an attempt that left a result came to its job's time limit, if any, or the signal before it."""
    folder = Path(spec.root) / spec.folder
    until = durable.read_object(folder / CLAIM_NAME).get("until", 0)
    # Slurm sends the signal up to a minute early.
    return bool(until) and (folder / RESULT_NAME).stat().st_mtime >= until - spec.grace_seconds - 60


def load_curve(work_folder: WorkFolder, run_id: int) -> Curve | None:
    """Return the loss curve of a run's adapter or, before that, its latest training; `None` if missing or damaged."""
    try:
        adapter = load_adapter(work_folder, run_id)
        if adapter is not None:
            return Curve(loss=adapter.loss_curve, dev=adapter.dev_curve)
        drawn = (run_folder(work_folder, run_id) / "attempts").glob(f"train-*/{CURVE_NAME}")
        latest = max(drawn, key=lambda path: path.stat().st_mtime_ns, default=None)
        return None if latest is None else Curve.model_validate(durable.read_json(latest))
    except (OSError, ValueError, ArtifactDamaged):
        return None


def made_checkpoint(work_folder: WorkFolder, run_id: int, since: int) -> bool:
    """Return whether the run's training wrote a checkpoint, or ended a trial, since `since`, in ms since the epoch."""
    folder = run_folder(work_folder, run_id) / "checkpoints"
    left = (path for pattern in _FURTHER for path in folder.glob(pattern))
    return any(path.stat().st_mtime_ns // 1_000_000 >= since for path in left)


def made_predictions(work_folder: WorkFolder, run_id: int, number: int) -> bool:
    """Return whether attempt `number` at `evaluate` computed predictions, more than it copied from earlier attempts."""

    def files_of(attempt: int) -> dict[str, Path]:
        folder = work_folder / attempt_folder(run_id, "evaluate", attempt)
        return {path.name: path for path in folder.glob("predictions/*.jsonl") if path.stat().st_size}

    copied = {name for earlier in range(1, number) for name in files_of(earlier)}
    # All that an attempt copies is one line (`pipeline.evaluate.prediction_cache`).
    return any(path.read_bytes().count(b"\n") > (name in copied) for name, path in files_of(number).items())


def remove_leftovers(work_folder: WorkFolder, run_id: int) -> None:
    """Delete temporary files of a killed daemon in a run's folder; not those of its steps, which may be running."""
    folder = run_folder(work_folder, run_id)
    durable.remove_leftovers(folder)
    for attempt in (folder / "attempts").glob("*"):
        for name in (SPEC_NAME, REVOKED_NAME):
            durable.remove_leftovers(attempt, name)


def read_result(spec: StepSpec) -> StepResult | None:
    """Return the attempt's result; `None` if missing or of another key or fence. Raises `ValueError` if malformed."""
    value = durable.read_json(Path(spec.root) / spec.folder / RESULT_NAME)
    if value is None:
        return None
    result = StepResult.model_validate(value)
    return result if (result.key, result.fence) == (spec.key, spec.fence) else None


def open_jobs(work_folder: Path) -> list[Path]:
    """Return the `job.json` of each attempt that a cluster may still run: it has no result and is not revoked."""
    jobs = work_folder.glob(f"runs/*/attempts/*/{JOB_NAME}")
    return [path for path in jobs if not any((path.parent / name).exists() for name in (RESULT_NAME, REVOKED_NAME))]


def publish(
    spec: StepSpec, result: StepResult, lock: contextlib.AbstractContextManager[None] | None = None
) -> Artifact:
    """
    Check a successful result, write its artifact to `runs/<id>/<step>.json` and return it.

    Outputs are hashed and synced, which may take minutes, before `lock` is taken; files are moved while it is held. The
    folder of a merged model moves to `models/<model_id>`, unless that is there already, and the returned artifact
    names that; predictions of an evaluation are linked into the cache. Safe to repeat. Raises `StepFailed` if the
    artifact is malformed, the model's folder is missing or, in other steps, an output is missing or has changed.
    """
    root = WorkFolder(Path(spec.root))
    try:
        artifact: Artifact = BY_NAME[spec.step].writes.model_validate(result.artifact)
    except ValueError as error:
        message = f"step {spec.step} left a malformed artifact: {error}"
        raise StepFailed(message, f"the whole story: dropforge logs {spec.run}") from error
    if isinstance(artifact, Model):
        durable.fsync_tree(root / artifact.folder)
    else:
        place = root / spec.folder
        bad = [
            name
            for name, digest in result.outputs.items()
            if not (place / name).is_file() or durable.sha256_file(place / name) != digest
        ]
        if bad:
            message = f"step {spec.step} named files that are missing or not as it left them: {', '.join(bad[:3])}"
            raise StepFailed(message, f"retry the run: dropforge retry {spec.run}")
    with lock or contextlib.nullcontext():
        if isinstance(artifact, Model):
            artifact = _publish_model(root, artifact)
        if isinstance(artifact, Evaluation):
            _keep_predictions(root, spec, artifact)
        durable.write_json(run_folder(root, spec.run) / f"{spec.step}.json", artifact.model_dump(mode="json"))
    return artifact


def unpublish(work_folder: WorkFolder, run_id: int, step: str) -> None:
    """Rename the step's artifact to `<step>.stale-<number>.json`, so that it is redone. Raises `OSError` if missing."""
    folder = run_folder(work_folder, run_id)
    number = 1
    while (folder / f"{step}.stale-{number}.json").exists():
        number += 1
    (folder / f"{step}.json").rename(folder / f"{step}.stale-{number}.json")
    durable.fsync_folder(folder)


def _publish_model(root: WorkFolder, model: Model) -> Model:
    """Move a merged model to `models/<model_id>`; return it with that folder. Raises `StepFailed` if it is missing."""
    target = root / "models" / model.model_id
    target.parent.mkdir(exist_ok=True)
    source = root / model.folder
    if source.is_dir() and source != target:
        durable.publish_folder(source, target)
    if not target.is_dir():
        message = f"the merged model is not there: {model.folder}"
        raise StepFailed(message, "retry the run; its log says how the merge ended")
    return model.model_copy(update={"folder": f"models/{model.model_id}"})


def _keep_predictions(root: WorkFolder, spec: StepSpec, report: Evaluation) -> None:
    """Hard-link an evaluation's predictions into the cache, a file per key and attempt, unless they are there."""
    for key in sorted(set(report.prediction_keys.values())):
        source = root / spec.folder / "predictions" / f"{key}.jsonl"
        folder = root / spec.predictions / key
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{spec.key}.jsonl"
        if source.is_file() and not target.exists():
            os.link(source, target)
            durable.fsync_folder(folder)
            durable.fsync_folder(folder.parent)
