"""Spectrum: the layers whose weights have most signal to noise are trained, in full (arXiv:2406.06623)."""

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

#: Of a normal distribution, the distance of its quartiles in standard deviations.
_QUARTILES = 1.349


def signal_to_noise(weight: "torch.Tensor") -> float:
    """
    Return how much larger the signal in a matrix is than its noise.

    Singular values above s (1 + sqrt(short / long)) are signal, the others noise: that is the Marchenko-Pastur law's
    edge for noise of the size s, taken from the singular values' quartiles as of a normal distribution. The ratio of
    both sums is divided by the largest singular value.
    """
    import torch

    lying = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    # A fifth of the time of a decomposition; in float64 what the squares lose is nothing.
    values = torch.linalg.eigvalsh(lying @ lying.T).clamp(min=0).sqrt()
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75]).to(values)).tolist()
    edge = (high - low) / _QUARTILES * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    signal, noise = float(values[values > edge].sum()), float(values[values <= edge].sum())
    return signal / noise / float(values[-1]) if noise else math.inf


def chosen_layers(layers: Iterable[str], read: "Callable[[str], torch.Tensor]", config: TrainConfig) -> list[str]:
    """
    Return which of `layers` are trained: of those of one last name the share `config.share`, at least one.

    `read` gives the weight of a layer; one at a time is there. Raises `CannotTrain` if one is not finite.
    """
    began = time.monotonic()
    kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name in layers:
        weight = read(name)
        if not bool(weight.isfinite().all()):
            message = f"the base model's {name} holds numbers that are not finite"
            raise CannotTrain(message, "get the model anew from whom you trust, or use another one")
        kinds[name.rsplit(".", 1)[-1]].append((signal_to_noise(weight), name))
    found = [
        name for ranked in kinds.values() for _, name in sorted(ranked, reverse=True)[: config.chosen(len(ranked))]
    ]
    seconds = time.monotonic() - began
    sys.stderr.write(f"spectrum trains these layers, found in {seconds:.0f} s: {', '.join(sorted(found))}\n")
    return sorted(found)
