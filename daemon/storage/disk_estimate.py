"""Upper bounds for the bytes that each step of a run leaves on the disk, from base model, settings and drops."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sqlalchemy import func
from sqlmodel import Session, col, select

from daemon.settings.model import TrackSettings
from daemon.state.run_files import published, run_folder
from daemon.state.states import DropState
from daemon.state.tables import Drop, Run
from daemon.storage.retention import tree_bytes
from pipeline.config import RunConfig, TrainConfig
from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_files
from pipeline.models.memory_estimate import base_sizes, moment_numbers, trained_numbers
from pipeline.search_settings import largest, most_trials

#: Most checkpoints at the same time: those that are kept (KEPT in pipeline.train.checkpoints) and the one
#: being written.
CHECKPOINTS = 3
_SMALL = 1 << 20
_NUMBER_BYTES = 4
"""Of a trained number, or a moment of the optimizer: float32; the 8-bit optimizers need less."""
_ROW_BYTES = 400
"""What `prepare` adds to a row: ids, keys, escapes."""
_ANSWER_BYTES = 1000
"""Of a cached answer and its record in the report, beside the text."""
_TOKEN_BYTES = 8
_LONGEST_ANSWER = 512


class CannotTell(DropforgeError):
    """The base model's files cannot be read, so the disk space of a run cannot be estimated."""


def needed_bytes(config: RunConfig | TrackSettings, data_bytes: int, rows: int) -> dict[str, int]:
    """
    Return an upper bound, in bytes, for the files of each step of a run; `data_bytes` and `rows` are of its drops.

    Computed from the headers of the base model's safetensors files. Raises `CannotTell` if they cannot be read.
    """
    base = Path(config.base_model)
    try:
        counts = base_sizes(base)
        sizes = [(path.suffix == ".safetensors", path.stat().st_size) for path in model_files(base)]
    except (OSError, ValueError) as error:
        message = f"the base model {base} cannot be read: {error}"
        raise CannotTell(message, "see what dropforge doctor says of it") from error
    # With the largest rank that a search tries.
    train = config.train.model_copy(update={"rank": int(largest(config.train.search, "rank", config.train.rank))})
    beside = sum(size for is_weights, size in sizes if not is_weights)
    trained = trained_numbers(counts, train) * _NUMBER_BYTES
    moments = moment_numbers(counts, train) * _NUMBER_BYTES
    result = trained + beside
    answer = (config.evaluate.max_new_tokens or _LONGEST_ANSWER) * _TOKEN_BYTES + _ANSWER_BYTES
    data = data_bytes + rows * _ROW_BYTES
    steps = {
        # Twice: the sorted parts exist at the same time as the result.
        "prepare": 2 * data,
        "train": CHECKPOINTS * (result + moments) + _adapters(train) * result,
        "merge": sum(size for _, size in sizes),
        # Both models' predictions, and the records with both models' answers.
        "evaluate": 4 * config.split.scored_records * answer,
    }
    return {step: size + _SMALL for step, size in steps.items()}


def _adapters(train: TrainConfig) -> int:
    """Return the number of adapters that a training leaves: of a search one per trial, and a copy of the chosen one."""
    return 1 + most_trials(train.search) if train.search.space else 1


def of_waiting_drops(session: Session, track: str) -> tuple[int, int]:
    """Return the bytes and rows of all accepted drops of `track`, an estimate for its next run."""
    sums = select(func.sum(col(Drop.size_bytes)), func.sum(col(Drop.rows)))
    size, rows = session.exec(sums.where(Drop.track == track, Drop.state == DropState.ACCEPTED)).one()
    return size or 0, rows or 0


def still_needed(state_folder: Path, run: Run) -> dict[str, int]:
    """Return `needed_bytes` of a claimed run for its unfinished steps, less the bytes of its checkpoints."""
    run_id = run.id or 0
    needs = needed_bytes(RunConfig.model_validate(run.config), *_of_snapshot(state_folder, run.snapshot or ()))
    checkpoints = tree_bytes(run_folder(state_folder, run_id) / "checkpoints")
    needs["train"] = max(needs["train"] - checkpoints, 0)
    done = published(state_folder, run_id)
    return {step: size for step, size in needs.items() if step not in done}


def _of_snapshot(state_folder: Path, snapshot: Iterable[Mapping[str, object]]) -> tuple[int, int]:
    """Return the bytes and rows of the drops in a run's snapshot; a missing file counts as 0 bytes."""
    drops = list(snapshot)
    files = [state_folder / str(drop["path"]) for drop in drops]
    return sum(file.stat().st_size for file in files if file.exists()), sum(int(str(drop["rows"])) for drop in drops)
