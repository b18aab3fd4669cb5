"""Records as the model sees them, by the template of the track's base model, in a child process."""

from pathlib import Path
from typing import Any

from daemon.champions import smoke_test
from daemon.settings.model import Settings
from pipeline.errors import DropforgeError


def shown_records(path: Path, settings: Settings, track: str, most: int) -> list[dict[str, Any]]:
    """
    Return the first `most` records of a file as the models of `track` see them: what `pipeline.records.shown` prints.

    Raises `DropforgeError` without a base model or the training stack, or if the template cannot be used.
    """
    base, train = settings.track(track).base_model, settings.track(track).train
    if not base:
        raise DropforgeError(
            "no base model is set, whose template writes the prompts", "set base_model in the settings"
        )
    request = {"file": str(path.absolute()), "folder": base, "format": train.format, "window": train.max_length}
    return list(smoke_test.ask({**request, "most": most}, "cpu", "pipeline.records.shown"))
