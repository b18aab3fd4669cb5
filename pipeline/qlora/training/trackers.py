"""Experiment trackers beside Dropforge's own curves: local files only, as a step has no network."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import CannotTrain

#: Packages, each of which will do, and the variable that says where the files go.
_TRACKERS = {
    "tensorboard": (("tensorboard", "tensorboardX"), "TENSORBOARD_LOGGING_DIR"),
    "trackio": (("trackio",), "TRACKIO_DIR"),
}


def open_trackers(names: Sequence[str], folder: Path) -> None:
    """Let the trackers of these names write into `folder`. Raises `CannotTrain` if one is not installed."""
    for name in names:
        packages, variable = _TRACKERS[name]
        if not any(find_spec(package) for package in packages):
            message = f"train.report_to has {name!r}, and there is no such package"
            raise CannotTrain(
                message, f"install it beside Dropforge, as with pip install {packages[0]}, or take it out"
            )
        os.environ[variable] = str(folder / name)
