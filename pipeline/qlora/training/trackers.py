"""Experiment trackers beside Dropforge's own curves: local files only, as a step has no network."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import CannotTrain

#: Each of them will do.
_PACKAGES = ("tensorboard", "tensorboardX")


def open_trackers(names: Sequence[str], folder: Path) -> None:
    """Let TensorBoard, if `names` has it, write into `folder`. Raises `CannotTrain` if it is not installed."""
    if not names:
        return
    if not any(map(find_spec, _PACKAGES)):
        message = "train.report_to has 'tensorboard', and there is no such package"
        raise CannotTrain(message, "install it beside Dropforge, as with pip install tensorboard, or take it out")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
