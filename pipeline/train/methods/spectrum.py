"""Spectrum: train the layers whose weights have the highest signal-to-noise ratio (arXiv:2406.06623)."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pipeline.config import TrainConfig
from pipeline.errors import CannotTrain

if TYPE_CHECKING:
    import torch

#: Interquartile range of a normal distribution, in standard deviations.
_QUARTILES = 1.349


def signal_to_noise(weight: "torch.Tensor") -> float:
    """
    Return the signal-to-noise ratio of a matrix.

    Singular values above s (1 + sqrt(short / long)) are signal, the others noise: this is the Marchenko-Pastur law's
    edge for noise of standard deviation s, which is estimated from the singular values' interquartile range. The ratio
    of both sums is divided by the largest singular value.
    """
    import torch

    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    # A fifth of the time of a decomposition; in float64 squaring loses no relevant digits.
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75]).to(values)).tolist()
    edge = (high - low) / _QUARTILES * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    signal, noise = float(values[values > edge].sum()), float(values[values <= edge].sum())
    return signal / noise / float(values[-1]) if noise else math.inf


def chosen_layers(layers: Iterable[str], read: "Callable[[str], torch.Tensor]", config: TrainConfig) -> list[str]:
    """
    Return the layers to train: the best share `config.share` of the layers with the same last name, at least one.

    `read` returns a layer's weight; one at a time is in memory. Raises `CannotTrain` if one is not finite.
    """
    began = time.monotonic()
    kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name in layers:
        weight = read(name)
        if not bool(weight.isfinite().all()):
            message = f"the base model's {name} holds numbers that are not finite"
            raise CannotTrain(message, "download the model again from a trusted source, or use another one")
        kinds[name.rsplit(".", 1)[-1]].append((signal_to_noise(weight), name))
    chosen = sorted(
        name for ranked in kinds.values() for _, name in sorted(ranked, reverse=True)[: config.chosen(len(ranked))]
    )
    seconds = time.monotonic() - began
    sys.stderr.write(f"spectrum trains these layers, ranked in {seconds:.0f} s: {', '.join(chosen)}\n")
    return chosen
