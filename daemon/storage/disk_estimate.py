"""Upper bounds for the bytes that training and merge leave on the disk, from base model and settings."""

from pathlib import Path

from daemon.settings.model import TrackSettings
from daemon.state.run_files import published, run_folder
from daemon.state.tables import Run
from daemon.storage.retention import tree_bytes
from daemon.system.folders import WorkFolder
from pipeline.config import RunConfig
from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_files
from pipeline.models.memory_estimate import base_sizes, moment_numbers, trained_numbers
from pipeline.search_settings import largest_rank, most_trials

#: Most checkpoints at the same time: those that are kept (KEPT in pipeline.train.checkpoints) and the one
#: being written.
CHECKPOINTS = 3
_SMALL = 1 << 20
_NUMBER_BYTES = 4
"""Bytes per trained number and per optimizer moment: float32; 8-bit optimizers need less."""


class CannotTell(DropforgeError):
    """The base model's files cannot be read, so the disk space of a run cannot be estimated."""


def needed_bytes(config: RunConfig | TrackSettings) -> dict[str, int]:
    """
    Return upper bounds, in bytes, for the large files of a run, by step: `{"train": ..., "merge": ...}`.

    Computed from the headers and sizes of the base model's files. Raises `CannotTell` if they cannot be read.
    """
    base = Path(config.base_model)
    try:
        counts = base_sizes(base)
        sizes = [(path.suffix == ".safetensors", path.stat().st_size) for path in model_files(base)]
    except (OSError, ValueError) as error:
        message = f"the base model {base} cannot be read: {error}"
        raise CannotTell(message, "see what dropforge doctor says of it") from error
    # With the largest rank that a search tries.
    train = config.train.model_copy(update={"rank": int(largest_rank(config.train.search, config.train.rank))})
    beside = sum(size for is_weights, size in sizes if not is_weights)
    trained = trained_numbers(counts, train) * _NUMBER_BYTES
    moments = moment_numbers(counts, train) * _NUMBER_BYTES
    result = trained + beside
    # Of a search one adapter per trial, and a copy of the chosen one.
    adapters = 1 + most_trials(train.search) if train.search.space else 1
    steps = {"train": CHECKPOINTS * (result + moments) + adapters * result, "merge": sum(size for _, size in sizes)}
    return {step: size + _SMALL for step, size in steps.items()}


def still_needed(work_folder: WorkFolder, run: Run) -> dict[str, int]:
    """Return `needed_bytes` of a begun run's unpublished steps, "train" less its checkpoints. Raises `CannotTell`."""
    run_id = run.id or 0
    needs = needed_bytes(RunConfig.model_validate(run.config))
    checkpoints = tree_bytes(run_folder(work_folder, run_id) / "checkpoints")
    needs["train"] = max(needs["train"] - checkpoints, 0)
    done = published(work_folder, run_id)
    return {step: size for step, size in needs.items() if step not in done}
