"""The merge step: what was trained, and the 16-bit model that it was trained over → the folder that is served."""

import sys
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import TRAINED_FILES, Adapter, Dataset, Model
from pipeline.contract import Attempt
from pipeline.dataset.start import require_start
from pipeline.errors import CannotTrain, StepFailed
from pipeline.model_folder.manifest import Lineage, model_id, read_lineage, write_manifest
from pipeline.model_folder.trained_ids import trained_ids, write_trained_ids
from pipeline.prompt import Format, fold, prompt_ids
from pipeline.qlora.generation import end_tokens
from pipeline.qlora.loading import load_tokenizer
from pipeline.qlora.merging import ROUNDING, Answering, ask_adapted, ask_trained, compare, merge_into

_PROMPTS = 4
_PHASES = 4


def merge(attempt: Attempt) -> Model:
    """
    Merge the adapter, or the trained weights, into what they were trained over; compare the folder with both.

    The folder says what the model was trained on, by this run and by those behind the champion that it began with.
    Raises `StepFailed` if they are not what was trained, or if the two differ by more than rounding, and
    `CannotTrain` if a weight or logit is not finite, the base was replaced since, or the champion's folder is not what
    it was.
    """
    started = time.monotonic()
    adapter, dataset = attempt.load(Adapter), attempt.load(Dataset)
    base, trained = Path(attempt.config.base_model), attempt.path(adapter.folder) / TRAINED_FILES[adapter.kind]
    target = attempt.folder / "model"
    _check_trained(attempt, adapter, trained)
    if model_id(base) != adapter.base_model_id:
        message = f"the base model {base} is not the one that was trained on"
        raise CannotTrain(message, f"restore its files, or train on the new one: dropforge retry {attempt.spec.run}")
    start = base if adapter.start is None else require_start(attempt, adapter.start)
    lineage = None if adapter.start is None else read_lineage(start)
    tokenizer: Any = load_tokenizer(base)
    answering = Answering(
        adapter.format, dataset.max_new_tokens, attempt.config.evaluate.repetition_penalty, end_tokens(base, tokenizer)
    )
    prompts = _prompts(attempt, dataset, tokenizer, adapter.format)
    _phase(attempt, 0, "ask")
    if adapter.kind == "adapter":
        adapted, expected = ask_adapted(start, trained.parent, prompts)
    else:
        adapted, expected = ask_trained(start, trained, prompts)
    not_streamed = adapted.not_streamed
    _phase(attempt, 1, "merge")
    dtype = merge_into(adapted, tokenizer, target, answering)
    del adapted
    _phase(attempt, 2, "hash")
    rows = durable.read_jsonl(attempt.path(dataset.folder) / "train.jsonl")
    # What the models below and beside had learnt is in this one, too: a record of that must never count as unseen.
    others = (start, *(attempt.path(one.path) for one in adapter.also_trained_on))
    write_trained_ids(target, chain((row["id"] for row in rows), *map(trained_ids, others)))
    trainings = 1 if lineage is None else lineage.trainings + 1
    identity = write_manifest(target, Lineage(adapter.base_model_id, trainings))
    _phase(attempt, 3, "compare")
    drift = compare(target, prompts, expected, streamed=not not_streamed)
    most = ROUNDING.get(dtype, ROUNDING["bfloat16"])
    sys.stderr.write(
        f"the merged model's logits are {drift.distance:.2g} away ({most:.2g} at most), "
        f"with the same likeliest token at {drift.top1:.0%} of the places\n"
    )
    if drift.distance > most:
        message = (
            f"the merged model's logits are {drift.distance:.2g} away from those of what was trained, "
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


def _check_trained(attempt: Attempt, adapter: Adapter, path: Path) -> None:
    if not path.is_file() or durable.sha256_file(path) != adapter.adapter_sha256:
        message = f"{path} is missing or not the one that was trained"
        raise StepFailed(message, f"train it again: dropforge retry {attempt.spec.run} --from train")


def _prompts(attempt: Attempt, dataset: Dataset, tokenizer: Any, fmt: Format) -> list[list[int]]:
    """Return a few tokenised prompts of the dataset to compare on: dev rows, then training rows."""
    data = attempt.path(dataset.folder)
    files = [path for path in (data / "dev.jsonl", data / "train.jsonl") if path.exists()]
    rows = islice(chain.from_iterable(durable.read_jsonl(path) for path in files), _PROMPTS)
    window = attempt.config.train.max_length
    return [prompt_ids(tokenizer, fmt, fold(row["instruction"], row["input"]))[:window] for row in rows]
