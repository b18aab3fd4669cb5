"""The merge step: adapter and 16-bit base → the model folder that is evaluated and served."""

import sys
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Adapter, Dataset, Model
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, StepFailed
from pipeline.model_folder.manifest import model_id, write_manifest
from pipeline.model_folder.trained_ids import trained_ids, write_trained_ids
from pipeline.prompt import Format, fold, prompt_ids
from pipeline.qlora.generation import end_tokens
from pipeline.qlora.loading import load_tokenizer
from pipeline.qlora.merging import Answering, ask_adapted, compare, merge_into, tolerance

_PROMPTS = 4
_PHASES = 4


def merge(attempt: Attempt) -> Model:
    """
    Merge the adapter into the base in the base's dtype, then compare the reloaded folder with the unmerged pair.

    Raises `StepFailed` if the adapter is not the one that was trained, or if the two differ by more than rounding, and
    `CannotTrain` if the base was replaced since.
    """
    started = time.monotonic()
    adapter, dataset = attempt.load(Adapter), attempt.load(Dataset)
    base, trained = Path(attempt.config.base_model), attempt.path(adapter.folder)
    target = attempt.folder / "model"
    _check_adapter(attempt, adapter)
    if model_id(base) != adapter.base_model_id:
        message = f"the base model {base} is not the one that the adapter was trained on"
        raise CannotTrain(message, f"restore its files, or train on the new one: dropforge retry {attempt.spec.run}")
    tokenizer: Any = load_tokenizer(base)
    answering = Answering(
        adapter.format, dataset.max_new_tokens, attempt.config.evaluate.repetition_penalty, end_tokens(base, tokenizer)
    )
    prompts = _prompts(attempt, dataset, tokenizer, adapter.format)
    _phase(attempt, 0, "ask")
    adapted, expected, before = ask_adapted(base, trained, prompts)
    not_streamed = adapted.not_streamed
    _phase(attempt, 1, "merge")
    dtype = merge_into(adapted, tokenizer, target, answering)
    del adapted
    _phase(attempt, 2, "hash")
    rows = durable.read_jsonl(attempt.path(dataset.folder) / "train.jsonl")
    also = (trained_ids(attempt.path(one.path)) for one in adapter.also_trained_on)
    write_trained_ids(target, chain((row["id"] for row in rows), *also))
    identity = write_manifest(target)
    _phase(attempt, 3, "compare")
    drift = compare(target, prompts, expected, streamed=not not_streamed)
    most = tolerance(dtype, before.logits, expected.logits)
    sys.stderr.write(
        f"the merged model's logits are {drift.distance:.2g} away ({most:.2g} at most), "
        f"with the same likeliest token at {drift.top1:.0%} of the places\n"
    )
    if drift.distance > most:
        message = (
            f"the merged model's logits are {drift.distance:.2g} away from the adapter's on the base, "
            f"and rounding explains {most:.2g} at most"
        )
        raise StepFailed(message, f"retry the run: dropforge retry {attempt.spec.run}; if it stays, report this")
    attempt.progress(_PHASES, _PHASES, phase="compare")
    return Model(
        folder=attempt.relative(target),
        model_id=identity,
        base_model_id=adapter.base_model_id,
        dtype=dtype,
        size_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        logits_difference=drift.distance,
        logits_tolerance=most,
        top1_agreement=drift.top1,
        not_streamed=not_streamed,
        format=adapter.format,
        seconds=time.monotonic() - started,
    )


def _phase(attempt: Attempt, done: int, name: str) -> None:
    attempt.check_stop()
    attempt.progress(done, _PHASES, phase=name)


def _check_adapter(attempt: Attempt, adapter: Adapter) -> None:
    path = attempt.path(adapter.folder) / "adapter_model.safetensors"
    if not path.is_file() or durable.sha256_file(path) != adapter.adapter_sha256:
        message = f"the adapter {path} is missing or not the one that was trained"
        raise StepFailed(message, f"train it again: dropforge retry {attempt.spec.run} --from train")


def _prompts(attempt: Attempt, dataset: Dataset, tokenizer: Any, fmt: Format) -> list[list[int]]:
    """Return a few tokenised prompts of the dataset to compare on: dev rows, then training rows."""
    data = attempt.path(dataset.folder)
    files = [path for path in (data / "dev.jsonl", data / "train.jsonl") if path.exists()]
    rows = islice(chain.from_iterable(durable.read_jsonl(path) for path in files), _PROMPTS)
    window = attempt.config.train.max_length
    return [prompt_ids(tokenizer, fmt, fold(row["instruction"], row["input"]))[:window] for row in rows]
