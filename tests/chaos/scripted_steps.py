"""Steps that write files of some size and do nothing else, for daemons whose disk is full or cut off."""

from collections.abc import Callable

from pipeline import durable
from pipeline.artifacts import Adapter, Artifact, Dataset, Evaluation, Model, Scores, Verdict
from pipeline.contract import Attempt as StepAttempt
from tests.model_folder import write_model


def _prepare(attempt: StepAttempt) -> Artifact:
    durable.write_bytes(attempt.folder / "train.jsonl", b"r" * 100_000)
    return Dataset(
        folder=attempt.spec.folder, train_rows=10, dev_rows=0, heldout_rows=120, heldout_pinned=False,
        heldout_version="v", dataset_sha256="d", duplicates=0, replaced=0, removed_heldout=0, metric="exact_match",
        max_new_tokens=16, drops=attempt.spec.drops,
    )  # fmt: skip


def _train(attempt: StepAttempt) -> Artifact:
    durable.write_bytes(attempt.make_folder("adapter") / "adapter_model.safetensors", b"a" * 300_000)
    return Adapter(
        folder=f"{attempt.spec.folder}/adapter", adapter_sha256="a", base_model_id="b", format="chat",
        quantization="none", device="cpu", optimizer_steps=1, resumed_from_step=0, trained_tokens=1, train_loss=1.0,
        loss_curve=(), dev_curve=(), trainable_parameters=1, adapter_change=1.0, rows_too_long=0, seconds=1.0,
    )  # fmt: skip


def _merge(attempt: StepAttempt) -> Artifact:
    identity = write_model(attempt.folder / "model", b"%d" % attempt.spec.run * 1_000_000)
    return Model(
        folder=f"{attempt.spec.folder}/model", model_id=identity, base_model_id="b", dtype="bfloat16", size_bytes=1,
        logits_difference=0.0, logits_tolerance=0.1, format="chat", seconds=1.0,
    )  # fmt: skip


def _evaluate(attempt: StepAttempt) -> Artifact:
    (attempt.folder / "predictions").mkdir(exist_ok=True)
    durable.write_bytes(attempt.folder / "predictions/key.jsonl", b"p" * 100_000)
    scores = Scores(model_id="m", metrics={"exact_match": 50.0}, nll=1.0, generated=1, cached=0, seconds=1.0)
    return Evaluation(
        folder=attempt.spec.folder, metric="exact_match", heldout_version="v", records=120, candidate=scores,
        champion=scores.model_copy(update={"model_id": attempt.spec.champion.model_id}),
        champion_generation=attempt.spec.champion.generation, prediction_keys={"m": "key"},
    )  # fmt: skip


def _decide(attempt: StepAttempt) -> Artifact:
    model, report = attempt.load(Model), attempt.load(Evaluation)
    assert report.is_against(attempt.spec.champion), "decide would refuse this report"
    return Verdict(
        outcome="promoted", reasons=(), sentence="better", metric="exact_match", records=120,
        candidate_model_id=model.model_id, champion_model_id="b", champion_generation=report.champion_generation,
    )  # fmt: skip


ARTIFACTS: dict[str, Callable[[StepAttempt], Artifact]] = {
    "prepare": _prepare, "train": _train, "merge": _merge, "evaluate": _evaluate, "decide": _decide,
}  # fmt: skip
