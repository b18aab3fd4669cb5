"""What the rows of a track's promotions say, whoever read them: former champions, blocked and unhealthy models."""

from pathlib import Path
from typing import TYPE_CHECKING

from daemon.state.states import HookState, PromotionKind
from pipeline.artifacts import ModelRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from daemon.state.tables import Promotion, Track


def unhealthy_models(past: "Sequence[Promotion]") -> set[str]:
    """Return the models that failed their health command when they last came to serve: others took their place."""
    latest = {row.model_id: row for row in past}
    return {model for model, row in latest.items() if row.health_state == HookState.FAILED}


def former(past: "Sequence[Promotion]", track: "Track", state_folder: Path, most: int) -> list[ModelRef]:
    """
    Return up to `most` of a track's `past` champions that may serve again, the latest first.

    Not today's, not those that were rolled back from, that failed their health command or that a rollback skipped,
    not those whose folder is gone; base models are among them.
    """
    shut, over = blocked(past) | unhealthy_models(past) | {track.champion_model_id}, _skipped(past)
    found: dict[str, ModelRef] = {}
    for one in reversed(past):
        moved = one.model_id == track.base_model_id and track.base_path is not None
        path = track.base_path if moved and track.base_path is not None else one.model_path
        left = one.generation in over or one.model_id in shut
        if left or one.model_id in found or not (state_folder / path).is_dir():
            continue
        found[one.model_id] = ModelRef(
            model_id=one.model_id, path=path, generation=one.generation, drops=drops_of(past, one.model_id)
        )
        if len(found) == most:
            break
    return list(found.values())


def _skipped(past: "Sequence[Promotion]") -> set[int]:
    """Return the generations between those that were rolled back from and those that served again for them."""
    over: set[int] = set()
    for row in past:
        if row.kind == PromotionKind.ROLLBACK:
            before = [one.generation for one in past if one.generation < row.generation]
            target = max(one.generation for one in past if one.model_id == row.model_id and one.generation in before)
            over.update(generation for generation in before if generation > target)
    return over


def drops_of(past: "Sequence[Promotion]", model: str) -> tuple[int, ...] | None:
    """Return the drops in the snapshot that a champion's model was made from; `None` for a base model."""
    made = [row.drops for row in past if row.model_id == model and row.run_id is not None]
    return None if not made or made[-1] is None else tuple(made[-1])


def blocked(past: "Sequence[Promotion]") -> set[str]:
    """Return the models that were rolled back from and that nobody has brought back since."""
    shut = set()
    for row in past:
        if row.kind == PromotionKind.ROLLBACK and row.previous_model_id is not None:
            shut.add(row.previous_model_id)
        shut.discard(row.model_id)
    return shut


def forcing(run_id: int) -> str:
    """Return the command that makes a run's model the champion whatever its verdict."""
    return f"dropforge promote {run_id} --force --reason TEXT"
