"""What good steps hand over that loaded no model and read no data: for tests of those that wait for steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Adapter, Artifact, Dataset, Evaluation, Judgement, MemoryPlan, Model, ModelRef, Verdict
from pipeline.config import RunConfig
from pipeline.contract import StepResult, StepSpec
from pipeline.models.manifest import model_id
from tests.model_folder import write_model


def run_config(base: str | Path, identity: str = "", **sections: Any) -> RunConfig:
    """Return the settings of a run over a base model, whose id is that of its folder unless another one is given."""
    identity = identity or model_id(Path(base))
    return RunConfig(track="default", base_model=str(base), base_model_id=identity, salt="s", **sections)


def made_spec(root: Path, step: str, config: RunConfig | None = None, **more: Any) -> StepSpec:
    """Return the spec of run 1's first attempt at a step, without inputs and drops; the champion is the base."""
    config = config or RunConfig(track="default", base_model="m", base_model_id="m", salt="s")
    run, attempt = more.get("run", 1), more.get("attempt", 1)
    values = {
        "run": run,
        "attempt": attempt,
        "fence": "fence",
        "folder": f"runs/{run}/attempts/{step}-{attempt}",
        "checkpoints": f"runs/{run}/checkpoints",
        "predictions": "predictions",
        "env": {},
        "inputs": {},
        "drops": (),
        "champion": ModelRef(model_id=config.base_model_id, path=config.base_model, generation=0),
    }
    return StepSpec.model_validate({**values, "root": str(root), "step": step, "config": config, **more})


def good_result(spec: StepSpec, artifact: Artifact) -> StepResult:
    """Return the result of a step that made an artifact."""
    content = artifact.model_dump(mode="json")
    return StepResult(key=spec.key, fence=spec.fence, status="ok", exit_code=0, artifact=content)


def dataset_of(records: int, **more: Any) -> Dataset:
    """Return a dataset of so many held-out records."""
    values = {
        "folder": "dataset",
        "train_rows": 1,
        "dev_rows": 0,
        "heldout_rows": records,
        "heldout_groups": records,
        "heldout_pinned": False,
        "heldout_version": "v",
        "dataset_sha256": "d",
        "duplicates": 0,
        "replaced": 0,
        "removed_heldout": 0,
        "metric": "exact_match",
        "max_new_tokens": 8,
    }
    return Dataset.model_validate({**values, **more})


def made_dataset(spec: StepSpec, **more: Any) -> Dataset:
    """Return a dataset of enough records."""
    values = {"folder": spec.folder, "train_rows": 10, "max_new_tokens": 16}
    return dataset_of(120, **{**values, **more})


def heldout_row(name: str, row: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a row of heldout.jsonl that nothing else is near to, of drop 1."""
    facts = {"id": name, "references": [row["output"]], "drop": 1, "pinned": False}
    return {**row, **facts, "tags": [], "near": [], "group": name, **more}


def made_adapter(spec: StepSpec, **more: Any) -> Adapter:
    """Return an adapter that was trained in one step."""
    values = {
        "folder": spec.folder,
        "adapter_sha256": "a",
        "learning_rate": 1e-3,
        "epochs": 4.0,
        "base_model_id": "b",
        "format": "chat",
        "quantization": "none",
        "device": "cpu",
        "batch_tokens": 1024,
        "activations": "kept",
        "estimated_memory": {},
        "peak_memory_bytes": 0,
        "optimizer_steps": 1,
        "resumed_from_step": 0,
        "trained_tokens": 1,
        "loss_curve": (),
        "dev_curve": (),
        "trainable_parameters": 1,
        "rows_too_long": 0,
        "seconds": 1.0,
    }
    return Adapter.model_validate({**values, **more})


def memory_plan(**more: Any) -> MemoryPlan:
    """Return how a training on the CPU was planned that keeps all, over the base as saved."""
    values = {"device": "cpu", "quantization": "none", "batch_tokens": 4096, "activations": "kept"}
    return MemoryPlan.model_validate({**values, **more})


def made_model(spec: StepSpec, weights: bytes | None = None) -> Model:
    """Write a model of the run, and return it."""
    identity = write_model(Path(spec.root) / spec.folder / "model", weights or f"weights of run {spec.run}".encode())
    return model_of(f"{spec.folder}/model", identity)


def model_of(folder: str, identity: str, **more: Any) -> Model:
    """Return a model that lies in `folder`."""
    values = {"base_model_id": "b", "dtype": "bfloat16", "size_bytes": 1, "format": "chat", "seconds": 1.0}
    return Model.model_validate({"folder": folder, "model_id": identity, **values, **more})


def made_report(spec: StepSpec, predictions: bytes = b"{}\n", **more: Any) -> Evaluation:
    """Write predictions, and return a report against the champion of the order; of a control, that clears its trial."""
    folder = Path(spec.root) / spec.folder / "predictions"
    folder.mkdir(exist_ok=True)
    durable.write_bytes(folder / "key.jsonl", predictions)
    champion = spec.champion
    against = {"champion": scores_of(champion.model_id), "champion_generation": champion.generation}
    if spec.trial:
        more = {"trial": {"groups": 0, "wins": 0, "losses": 0, "p_value": 1.0}, **more}
    values = {"folder": spec.folder, "candidate": scores_of("m"), **against, "prediction_keys": {"m": "key"}}
    return report_of(120, **{**values, **more})


def report_of(records: int, **more: Any) -> Evaluation:
    """Return a report on so many records: of model `new` against `old`, the champion of generation 3."""
    values = {
        "folder": "report",
        "metric": "exact_match",
        "heldout_version": "v",
        "setup": "s",
        "records": records,
        "candidate": scores_of("new"),
        "champion": scores_of("old"),
        "champion_generation": 3,
        "prediction_keys": {},
    }
    return Evaluation.model_validate({**values, **more})


def scores_of(identity: str) -> dict[str, Any]:
    """Return what a model scored, all of it from the cache."""
    return {"model_id": identity, "metrics": {}, "nll": 1.0, "generated": 0, "cached": 0, "seconds": 0.0}


def judgement_of(wins: int, losses: int, **more: Any) -> Judgement:
    """Return what a judge said of records that are all won or lost."""
    counts = {"records": wins + losses, "wins": wins, "losses": losses, "ties": 0, "inconsistent": 0, "failed": 0}
    return Judgement.model_validate({"folder": "j", "model": "judge-7b", **counts, **more})


def made_verdict(spec: StepSpec, outcome: str, **more: Any) -> Verdict:
    """Return a verdict on what the steps before it published; there need be neither model nor report."""
    read = {name: durable.read_json(Path(spec.root) / path) for name, path in spec.inputs.items()}
    report = read.get("evaluate")
    assert report is None or Evaluation.model_validate(report).is_against(spec.champion), (
        "decide would refuse this report"
    )
    values = {
        "outcome": outcome,
        "reasons": (),
        "metric": "exact_match",
        "records": 120,
        "groups": 120,
        "candidate_model_id": read.get("merge", {}).get("model_id"),
        "champion_model_id": "b",
        "champion_generation": report and report["champion_generation"],
        "blames_new_drops": outcome == "worse",
        "heldout_version": read["prepare"].get("heldout_version"),
    }
    return Verdict.model_validate({**values, **more})
