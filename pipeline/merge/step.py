"""The merge step: the adapter or trained weights, and the 16-bit model below → the folder that is served."""

import time
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import TRAINED_FILES, Adapter, Dataset, Model
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, StepFailed
from pipeline.merge.merging import Answering, merge_into
from pipeline.models.generation import end_tokens
from pipeline.models.loading import load_tokenizer
from pipeline.models.manifest import (
    Lineage,
    model_id,
    read_lineage,
    require_start,
    trained_ids,
    write_manifest,
    write_trained_ids,
)

_PHASES = 2


def merge(attempt: Attempt) -> Model:
    """
    Merge the adapter, or the trained weights, into the model that was trained.

    The folder lists the records that the model was trained on, by this run and by those of the champion it started
    from. Raises `StepFailed` if the adapter's file has changed or is incomplete, and `CannotTrain` if a merged weight
    is not finite, the base was replaced, or the champion's folder has changed.
    """
    started = time.monotonic()
    adapter, dataset = attempt.load(Adapter), attempt.load(Dataset)
    base, trained = Path(attempt.config.base_model), attempt.path(adapter.folder) / TRAINED_FILES[adapter.kind]
    target = attempt.folder / "model"
    if not trained.is_file() or durable.sha256_file(trained) != adapter.adapter_sha256:
        message = f"{trained} is missing or has changed since the training"
        raise StepFailed(message, f"train it again: dropforge retry {attempt.spec.run} --from train")
    if model_id(base) != adapter.base_model_id:
        message = f"the base model {base} has changed since the training"
        raise CannotTrain(message, f"restore its files, or train on the new one: dropforge retry {attempt.spec.run}")
    start = base if adapter.start is None else require_start(attempt, adapter.start)
    lineage = None if adapter.start is None else read_lineage(start)
    tokenizer: Any = load_tokenizer(base)
    answering = Answering(
        adapter.format, dataset.max_new_tokens, attempt.config.evaluate.repetition_penalty, end_tokens(base, tokenizer)
    )
    attempt.check_stop()
    attempt.progress(0, _PHASES, phase="merge")
    dtype = merge_into(start, trained.parent if adapter.kind == "adapter" else trained, tokenizer, target, answering)
    attempt.check_stop()
    attempt.progress(1, _PHASES, phase="hash")
    rows = durable.read_jsonl(attempt.path(dataset.folder) / "train.jsonl")
    # Records that the start and the combined models were trained on must never count as unseen by this one.
    others = (start, *(attempt.path(model.path) for model in adapter.also_trained_on))
    write_trained_ids(target, chain((row["id"] for row in rows), *map(trained_ids, others)))
    trainings = 1 if lineage is None else lineage.trainings + 1
    identity = write_manifest(target, Lineage(adapter.base_model_id, trainings))
    attempt.progress(_PHASES, _PHASES, phase="hash")
    return Model(
        folder=attempt.relative(target),
        model_id=identity,
        base_model_id=adapter.base_model_id,
        dtype=dtype,
        size_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        format=adapter.format,
        seconds=time.monotonic() - started,
    )
