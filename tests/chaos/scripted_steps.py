"""Steps that write files of some size and do nothing else, for daemons whose disk is full or cut off."""

from collections.abc import Callable

from pipeline import durable
from pipeline.artifacts import Artifact, Preview
from pipeline.contract import Attempt as StepAttempt
from tests.made_artifacts import made_adapter, made_dataset, made_model, made_report, made_verdict


def _prepare(attempt: StepAttempt) -> Artifact:
    durable.write_bytes(attempt.folder / "train.jsonl", b"r" * 100_000)
    return made_dataset(attempt.spec)


def _train(attempt: StepAttempt) -> Artifact:
    durable.write_bytes(attempt.make_folder("adapter") / "adapter_model.safetensors", b"a" * 300_000)
    return made_adapter(attempt.spec, folder=f"{attempt.spec.folder}/adapter")


ARTIFACTS: dict[str, Callable[[StepAttempt], Artifact]] = {
    "prepare": _prepare,
    "train": _train,
    "merge": lambda attempt: made_model(attempt.spec, b"%d" % attempt.spec.run * 1_000_000),
    "evaluate": lambda attempt: made_report(attempt.spec, b"p" * 100_000),
    "decide": lambda attempt: made_verdict(attempt.spec, "promoted"),
    "preview": lambda _attempt: Preview(records=40, points=31.0, metric="exact_match"),
}
