"""
Choose the learning rate and epochs of a training whose settings are "auto".

The values of a small model are measured by bench/defaults.py, those of others are from papers: see README.md.
"""

import math

from pipeline.config import TrainConfig

#: Learning rate of LoRA up to, and above, so many weights.
_RATE, _LARGE_RATE, _LARGE = 1e-3, 3e-4, 6_000_000_000
#: Share of that rate, by method.
_SHARES = {"galore": 0.2, "spectrum": 0.1, "full": 0.1}
#: At the default rank, `rslora` scales updates by four times LoRA's factor.
_RSLORA_SHARE = 0.25
_STEPS = {"fast": 100, "balanced": 200, "quality": 400}
_MOST_EPOCHS = 4.0


def with_numbers(config: TrainConfig, rows: int, weights: int) -> TrainConfig:
    """
    Return `config` with its automatic learning rate and epochs chosen for a base of `weights` weights and `rows` rows.

    The epochs give the optimizer steps of `config.preset`, but they are at least one and at most four.
    """
    chosen: dict[str, float] = {}
    if config.learning_rate == "auto":
        share = _RSLORA_SHARE if config.rslora else _SHARES.get(config.method, 1.0)
        chosen["learning_rate"] = share * (_RATE if weights <= _LARGE else _LARGE_RATE)
    if config.epochs == "auto":
        wanted = _STEPS[config.preset] / math.ceil(rows / config.batch_size)
        chosen["epochs"] = round(min(_MOST_EPOCHS, max(1.0, wanted)), 2)
    return config.model_copy(update=chosen)
