"""The train step: training rows → an adapter for the base model, or trained weights."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pipeline import durable
from pipeline.artifacts import TRAINED_FILES, Adapter, Dataset, Trained, Trial
from pipeline.config import DEV_ROWS
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain, StepFailed
from pipeline.models.generation import load_template
from pipeline.models.loading import Device, OutOfMemory, chosen_device, free_memory
from pipeline.models.manifest import check_base, require_start
from pipeline.models.memory_estimate import base_sizes
from pipeline.models.placement import inference_quantization
from pipeline.models.template import Format, Template, conversation, fold
from pipeline.models.untrusted import read_window
from pipeline.records.heldout import dataset_hash
from pipeline.train.data_parallel import ProcessRank, job_of_several_nodes
from pipeline.train.job import Job, TokenRow, with_numbers
from pipeline.train.memory import go_on_with_less, plan_memory
from pipeline.train.search import search
from pipeline.train.training import process_count, train_in_processes, visible_gpus
from pipeline.words import count

#: Settings of a search that only limit its length; finished trials stay valid when they change.
_BUDGET = {"when", "trials", "hours"}
_LIBRARIES = ("accelerate", "bitsandbytes", "peft", "tokenizers", "torch", "transformers", "trl")


def tokenise(attempt: Attempt, template: Template, path: Path, window: int) -> tuple[list[TokenRow], list[int]]:
    """
    Return the tokenised rows of a JSON Lines file that fit into the window, and the lengths of all in tokens.

    Longer rows are left out whole, and counted on stderr. Both are empty if there is no file. Raises `Interrupted` if
    stopped, `CannotTrain` if the chat template or tokenizer fails.
    """
    kept, lengths = [], []
    for number, row in enumerate(durable.read_jsonl(path) if path.exists() else (), start=1):
        attempt.check_stop()
        turns = conversation(row.get("turns", ()), fold(row["instruction"], row["input"]), row["output"])
        prompt, answer = template.prompt(turns[:-1]), template.target(turns)
        lengths.append(len(prompt) + len(answer))
        if lengths[-1] <= window:
            kept.append(TokenRow([*prompt, *answer], [0] * len(prompt) + [1] * len(answer), number))
    if too_long := len(lengths) - len(kept):
        sys.stderr.write(
            f"{path.name}: {count(len(kept), 'row')} kept; left out whole, never cut: {too_long} longer than "
            f"{window} tokens\n"
        )
    return kept, lengths


@dataclass(frozen=True)
class Prepared:
    """The tokenised data, base and tokenizer that all trainings of a run share."""

    base: Path
    device: Device
    tokenizer: Any
    format: Format
    rows: Sequence[TokenRow]
    dev: Sequence[TokenRow]
    dataset: Dataset
    rows_too_long: int

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each training row, in the order of `rows`."""
        return [len(row.input_ids) for row in self.rows]

    def mark(self, train: Mapping[str, object], base_model_id: str) -> str:
        """Return a fingerprint of data, device, format, settings `train` and base, or the champion to start from."""
        return durable.sha256_json(
            {
                "dataset": self.dataset.dataset_sha256,
                "base": base_model_id if self.dataset.start is None else self.dataset.start.model_id,
                "device": self.device,
                "format": self.format,
                "train": train,
            }
        )


def train(attempt: Attempt) -> Adapter:
    """
    Train the base model, or the champion that `prepare` chose, on `prepare`'s rows, once or with a search.

    Saves the result in the attempt's folder `adapter`, and returns its description. Raises `CannotTrain` if base, data
    and settings can never work together, `StepFailed` if training failed or the result could not be evaluated on the
    GPUs, `StartAgain` if memory ran out and another attempt must continue with less, and `Interrupted`, after saving a
    checkpoint, if it was stopped.
    """
    started = time.monotonic()
    config = attempt.config
    attempt.progress(0, 0, phase="load")
    prepared = _prepare(attempt, attempt.load(Dataset))
    adapter, trials = attempt.folder / "adapter", tuple[Trial, ...]()
    if config.train.search.space:
        once, chosen, trials = _search(attempt, prepared)
        shutil.copytree(chosen, adapter)
    else:
        once = _train_once(prepared, attempt, attempt.make_folder("adapter"))
    kind: Literal["adapter", "weights"] = "weights" if config.train.trains_full_weights else "adapter"
    return Adapter(
        folder=attempt.relative(adapter),
        kind=kind,
        adapter_sha256=durable.sha256_file(adapter / TRAINED_FILES[kind]),
        base_model_id=config.base_model_id,
        start=prepared.dataset.start,
        format=prepared.format,
        **once.model_dump(),
        rows_too_long=prepared.rows_too_long,
        versions={name: metadata.version(name) for name in _LIBRARIES},
        candidates=trials,
        seconds=sum(trial.seconds for trial in trials) if trials else time.monotonic() - started,
    )


def _prepare(attempt: Attempt, dataset: Dataset) -> Prepared:
    """
    Check that base and data are those of the run and can be trained on here, and tokenise the rows.

    Raises `CannotTrain` if not, or if no row fits into the window; `StepFailed` if the model cannot be evaluated on the
    GPUs; `Interrupted` if stopped.
    """
    config = attempt.config
    base = Path(config.base_model)
    check_base(base, config.train.format)
    start = require_start(attempt, dataset.start)
    device = chosen_device()
    process_count(config.train, device)  # raises if there are not so many GPUs
    if inference_quantization(device, start) == "nf4" and config.evaluate.vllm:
        raise StepFailed(
            f"the model in {start} does not fit on the GPU unquantised, as vLLM would evaluate it",
            "remove evaluate.vllm: both models are then evaluated in NF4",
        )
    template = load_template(base, config.train.format)
    window = min(config.train.max_length, read_window(base))
    data = attempt.path(dataset.folder)
    if dataset_hash(data) != dataset.dataset_sha256:
        raise CannotTrain(
            f"the run's data in {data} has changed since it was prepared",
            "restore its files, or drop the data again to begin a new run",
        )
    dev, _ = tokenise(attempt, template, data / "dev.jsonl", window)
    rows, lengths = tokenise(attempt, template, data / "train.jsonl", window)
    if not rows:
        raise CannotTrain(
            f"nothing to train on: the {count(len(lengths), 'training record has', 'training records have')} "
            f"{min(lengths)} to {max(lengths)} tokens, and the window is {window}",
            f"set train.max_length = {max(lengths)}, if the base model's own window allows it",
        )
    return Prepared(start, device, template.tokenizer, template.format, rows, dev, dataset, len(lengths) - len(rows))


def _train_once(prepared: Prepared, attempt: Attempt, adapter: Path, gpu: int = 0) -> Trained:
    """
    Train once with the attempt's settings; save the result in `adapter`, an empty folder. `gpu` is its first GPU.

    Raises what `train` raises. If memory ran out, `adapter` is removed.
    """
    config, base, device = attempt.config.train, prepared.base, prepared.device
    # The trials of a search are trained on the first node.
    nodes, meeting = (1, "") if config.search.space else job_of_several_nodes(config.batch_size)
    process = ProcessRank(count=process_count(config, device, nodes), gpu=gpu, nodes=nodes, meeting=meeting)
    scratch = attempt.make_folder("scratch")
    plan, sizes = plan_memory(attempt, base, device, prepared.lengths, process)
    estimated = sizes.estimate(plan)
    attempt.progress(0, 0, phase="load", memory=sum(estimated.values()))
    chosen = with_numbers(config, len(prepared.rows), base_sizes(base).weights)
    sys.stderr.write(f"learning rate {chosen.learning_rate:g}, {chosen.epochs:g} epochs\n")
    settings = {**chosen.decisive(), "quantization": plan.quantization}
    mark = prepared.mark(settings, attempt.config.base_model_id)
    rows, dev = prepared.rows, prepared.dev
    job = Job(base, device, rows, dev, chosen, plan, adapter, scratch, mark, estimated, process)
    try:
        return train_in_processes(job, prepared.tokenizer, attempt)
    except OutOfMemory as error:
        adapter.rmdir()
        go_on_with_less(attempt, plan, sizes, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _search(attempt: Attempt, prepared: Prepared) -> tuple[Trained, Path, tuple[Trial, ...]]:
    """
    Run the trials of [train.search]; return the training, the adapter's folder and all outcomes as `search` does.

    With `train.processes = "auto"` a trial runs on each visible GPU, otherwise each trial on that many GPUs. Raises
    `CannotTrain` with fewer than `DEV_ROWS` dev records, and what `train` raises.
    """
    config = attempt.config
    if len(prepared.dev) < DEV_ROWS:
        raise CannotTrain(
            f"a search needs {DEV_ROWS} dev records to choose by, and there are {len(prepared.dev)}",
            "drop more data, raise split.dev before a track's first verdict, or remove [train.search]",
        )
    searched = config.train.search.model_dump(mode="json", exclude=_BUDGET)
    mark = prepared.mark({**config.train.decisive(), "search": searched}, config.base_model_id)
    each = 1 if config.train.processes == "auto" else process_count(config.train, prepared.device)
    gpus = range(0, max(1, visible_gpus(prepared.device) - each + 1), each)
    # One precision is for all trials: that of the GPUs with the least free memory.
    least = ProcessRank(count=each, gpu=min(gpus, key=lambda gpu: free_memory(prepared.device, each, gpu)))
    plan, _ = plan_memory(attempt, prepared.base, prepared.device, prepared.lengths, least)
    shared = config.train.model_copy(update={"quantization": plan.quantization, "processes": each})
    return search(attempt, shared, mark, partial(_train_once, prepared), gpus)
