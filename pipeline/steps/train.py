"""The train step: the dataset's training rows → a QLoRA adapter over the base model."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.artifacts import Adapter, Dataset, LengthBin
from pipeline.contract import Attempt
from pipeline.dataset.heldout import dataset_hash
from pipeline.dataset.start import require_start
from pipeline.errors import CannotTrain
from pipeline.model_folder.manifest import check_base, model_id
from pipeline.prompt import Format, choose_format, completion_ids, fold, holds_special_token, prompt_ids
from pipeline.qlora.generation import end_tokens
from pipeline.qlora.loading import chosen_device, load_tokenizer
from pipeline.qlora.training.checkpoints import fingerprint
from pipeline.qlora.training.data_parallel.launch import fit_in_processes, process_count
from pipeline.qlora.training.data_parallel.sharing import Place
from pipeline.qlora.training.memory import OutOfMemory, find_fit, go_on_with_less
from pipeline.qlora.training.trainer import TokenRow, Training

CHECK_EVERY = 500
_MOST_BINS = 24
#: Settings that a training goes on under whatever they are; `quantization` counts as what it came to.
_LIBRARIES = ("accelerate", "bitsandbytes", "peft", "tokenizers", "torch", "transformers", "trl")


def train(attempt: Attempt) -> Adapter:
    """
    Train on `prepare`'s rows over the base model of the run's configuration, or the champion that `prepare` chose.

    Raises `CannotTrain` if base, data and settings can never work together, `StepFailed` if training went wrong,
    `StartAgain` if it is to go on in a fresh process as memory ran out, and `Interrupted`, with a checkpoint left
    behind, if it was asked to stop.
    """
    started = time.monotonic()
    config = attempt.config
    dataset = attempt.load(Dataset)
    base = Path(config.base_model)
    attempt.progress(0, 0, phase="load")
    _check_same_base(base, config.base_model_id)
    start = base if dataset.start is None else require_start(attempt, dataset.start)
    device = chosen_device()
    place = Place(processes=process_count(config.train, device))
    tokenizer: Any = load_tokenizer(base)
    fmt = choose_format(config.train.format, has_chat_template=bool(tokenizer.chat_template))
    tokeniser = Tokeniser(tokenizer, fmt, end_tokens(base, tokenizer), _window(attempt, base))
    data = attempt.path(dataset.folder)
    _check_same_data(data, dataset.dataset_sha256)
    rows = tokeniser.tokenise(attempt, data / "train.jsonl")
    tokeniser.refuse_none_left(rows)
    too_long, spelled, lengths = tokeniser.too_long, tokeniser.spelled, histogram([len(row.input_ids) for row in rows])
    dev = tokeniser.tokenise(attempt, data / "dev.jsonl")
    adapter, scratch = attempt.make_folder("adapter"), attempt.make_folder("scratch")
    memory = find_fit(attempt, start, device, [len(row.input_ids) for row in rows], place.processes)
    estimated = memory.bytes_of(memory.plan)
    attempt.progress(0, 0, phase="load", memory=sum(estimated.values()))
    mark = fingerprint(
        {
            "dataset": dataset.dataset_sha256,
            "base": config.base_model_id if dataset.start is None else dataset.start.model_id,
            "device": device,
            "format": fmt,
            "train": {**config.train.decisive(), "quantization": memory.plan.quantization},
        }
    )
    try:
        training = Training(start, device, adapter, scratch, mark, memory.plan, place)
        trained = fit_in_processes(training, tokenizer, rows, dev, attempt)
    except OutOfMemory as error:
        adapter.rmdir()
        go_on_with_less(attempt, memory, error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Adapter(
        folder=attempt.relative(adapter),
        adapter_sha256=durable.sha256_file(adapter / "adapter_model.safetensors"),
        base_model_id=config.base_model_id,
        start=dataset.start,
        format=fmt,
        quantization=memory.plan.quantization,
        batch_tokens=memory.plan.batch_tokens,
        activations=memory.plan.activations,
        device=memory.plan.device,
        optimizer_steps=trained.optimizer_steps,
        resumed_from_step=trained.resumed_from_step,
        checkpoints_skipped=trained.skipped,
        trained_tokens=trained.trained_tokens,
        train_loss=trained.train_loss,
        loss_curve=trained.loss_curve,
        dev_curve=trained.dev_curve,
        best_step=trained.best_step,
        ended_early=trained.ended_early,
        trainable_parameters=trained.trainable_parameters,
        adapter_change=trained.adapter_change,
        rows_too_long=too_long,
        rows_with_special_tokens=spelled,
        lengths=lengths,
        versions={name: metadata.version(name) for name in _LIBRARIES},
        estimated_memory=estimated,
        peak_memory_bytes=trained.peak_memory_bytes,
        seconds=time.monotonic() - started,
    )


@dataclass
class Tokeniser:
    """Turns rows into tokens, leaving out what cannot be trained whole, and counting it."""

    tokenizer: Any
    format: Format
    stops: Sequence[int]
    window: int
    """Most tokens of prompt and answer together."""
    too_long: int = 0
    spelled: int = 0
    """Rows whose text holds one of the tokenizer's special tokens; it is plain text to the model."""
    lengths: list[int] = field(default_factory=list)

    def tokenise(self, attempt: Attempt, path: Path) -> list[TokenRow]:
        """Return the rows of a JSON Lines file that fit. Raises `Interrupted` if the attempt is asked to stop."""
        self.too_long = self.spelled = 0
        self.lengths = []
        kept = []
        for number, row in enumerate(_rows(path), start=1):
            if number % CHECK_EVERY == 1:
                attempt.check_stop()
            content = fold(row["instruction"], row["input"])
            prompt = prompt_ids(self.tokenizer, self.format, content)
            answer = completion_ids(self.tokenizer, self.format, content, row["output"], self.stops)
            self.lengths.append(len(prompt) + len(answer))
            if self.lengths[-1] > self.window:
                self.too_long += 1
                continue
            self.spelled += holds_special_token(self.tokenizer, content, row["output"])
            kept.append(TokenRow([*prompt, *answer], [0] * len(prompt) + [1] * len(answer), number))
        if self.too_long or self.spelled:
            sys.stderr.write(
                f"{path.name}: {len(kept)} rows kept; left out whole, never cut: {self.too_long} longer than "
                f"{self.window} tokens; {self.spelled} kept ones spell special tokens of the tokenizer as plain text\n"
            )
        return kept

    def refuse_none_left(self, rows: Sequence[TokenRow]) -> None:
        """Raise `CannotTrain` if the latest file left nothing to train on."""
        if rows:
            return
        shortest, longest = min(self.lengths), max(self.lengths)
        message = (
            f"nothing to train on: the {self.too_long} training rows have {shortest} to {longest} tokens, "
            f"and the window is {self.window}"
        )
        raise CannotTrain(message, f"set train.max_length = {longest}, if the base model's own window allows it")


def histogram(lengths: Iterable[int]) -> tuple[LengthBin, ...]:
    """Return how many rows are how long, in at most 24 bins of equal width: a power of two of tokens."""
    known = list(lengths)
    width = 1
    while max(known, default=0) > width * _MOST_BINS:
        width *= 2
    counts = Counter(-(-length // width) for length in known)
    bins = range(min(counts, default=1), max(counts, default=0) + 1)
    return tuple(LengthBin(tokens=place * width, rows=counts[place]) for place in bins)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    return durable.read_jsonl(path) if path.exists() else ()


def _window(attempt: Attempt, base: Path) -> int:
    """Return the most tokens of a row: the setting, or the base model's own window where that is shorter."""
    own = durable.read_json(base / "config.json").get("max_position_embeddings")
    wanted = attempt.config.train.max_length
    return min(wanted, own) if isinstance(own, int) else wanted


def _check_same_data(folder: Path, expected: str) -> None:
    """Raise `CannotTrain` if the run's rows are not those that `prepare` froze."""
    if dataset_hash(folder) != expected:
        message = f"the run's data in {folder} has changed since it was prepared"
        raise CannotTrain(message, "restore its files, or drop the data again to begin a new run")


def _check_same_base(base: Path, expected: str) -> None:
    """Raise `CannotTrain` if the base cannot be trained, or is not the one that the run was taken up with."""
    check_base(base)
    if model_id(base) != expected:
        message = f"the base model {base} has changed since the run was taken up"
        raise CannotTrain(message, "restore its files, or train on the new one: dropforge retry RUN")
