"""Functions over a track's promotion rows: former champions, blocked models and wins, unhealthy models."""

from typing import TYPE_CHECKING, Any

from daemon.state.clauses import change_clauses
from daemon.state.states import HookState, PromotionKind
from daemon.system.folders import WorkFolder
from pipeline.artifacts import ModelRef
from pipeline.decide.explain import sentence
from pipeline.errors import DropforgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from daemon.state.tables import Promotion, Track


def unhealthy_models(past: "Sequence[Promotion]") -> set[str]:
    """Return the ids of models whose health command failed when they last became champion; `past` is oldest first."""
    latest = {row.model_id: row for row in past}
    return {model for model, row in latest.items() if row.health_state == HookState.FAILED}


def former(past: "Sequence[Promotion]", track: "Track", work_folder: WorkFolder) -> list[ModelRef]:
    """
    Return a track's champions that may serve again, the latest first; `past` is oldest first.

    Left out are today's champion, models in `blocked` or `unhealthy_models`, generations that a rollback skipped, and
    models whose folder is gone. A model is listed once; base models are included.
    """
    shut = blocked(past) | unhealthy_models(past) | {track.champion_model_id}
    # Later than the generation that a rollback restored, earlier than the rollback itself.
    spans = [range(row.restored + 1, row.generation) for row in past if row.restored is not None]
    models: list[ModelRef] = []
    for row in reversed(past):
        path = (track.base_path if row.model_id == track.base_model_id else None) or row.model_path  # it may have moved
        is_skipped = any(row.generation in span for span in spans)
        if not is_skipped and row.model_id not in shut and (work_folder / path).is_dir():
            drops = None if row.drops is None else tuple(row.drops)
            models.append(ModelRef(model_id=row.model_id, path=path, generation=row.generation, drops=drops))
            shut.add(row.model_id)
    return models


def blocked(past: "Sequence[Promotion]") -> set[str]:
    """Return the ids of models that were rolled back from and did not serve again since; `past` is oldest first."""
    shut = set()
    for row in past:
        if row.kind == PromotionKind.ROLLBACK and row.previous_model_id is not None:
            shut.add(row.previous_model_id)
        shut.discard(row.model_id)
    return shut


def no_champion(track: str) -> DropforgeError:
    """Return the error, to be raised, for a track without a champion, not even its base model."""
    hint = "set base_model in dropforge.toml and start the daemon: dropforge run"
    return DropforgeError(f"track {track} has no champion yet", hint)


def blocker(run: Any, past: "Sequence[Promotion]") -> str | None:
    """
    Return a clause that says why a win, by its run's row, cannot simply be approved; `None` if it can be.

    The only reason looked for is that its model was rolled back from. `past` are the track's champions, oldest first.
    """
    model_id = (run.verdict or {}).get("candidate_model_id")
    if model_id not in blocked(past):
        return None
    rows = [row for row in past if row.kind == PromotionKind.ROLLBACK and row.previous_model_id == model_id]
    return f"its model is blocked: the track was {sentence(change_clauses(rows[-1]))}"
