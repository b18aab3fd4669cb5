"""
Choose the learning rate and epochs of a training whose settings are "auto".

The values of a small model are measured by bench/defaults.py, those of others are from papers: see README.md.
"""

import math

from pipeline.config import TrainConfig

#: Learning rates of small and of large bases, by method.
_ADAPTERS, _ALL_WEIGHTS = (5e-4, 3e-4), (1e-4, 3e-5)
_RATES = {"lora": _ADAPTERS, "dora": _ADAPTERS, "galore": (2e-4, 6e-5), "spectrum": _ALL_WEIGHTS, "full": _ALL_WEIGHTS}
#: Most weights of a small base, for adapters and for methods that train the base's own weights.
_SMALL, _SMALL_OF_ALL = 6_000_000_000, 2_000_000_000
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
        is_large = weights > (_SMALL_OF_ALL if config.trains_full_weights else _SMALL)
        chosen["learning_rate"] = _RATES[config.method][is_large] * (_RSLORA_SHARE if config.rslora else 1)
    if config.epochs == "auto":
        wanted = _STEPS[config.preset] / math.ceil(rows / config.batch_size)
        chosen["epochs"] = round(min(_MOST_EPOCHS, max(1.0, wanted)), 2)
    return config.model_copy(update=chosen)
