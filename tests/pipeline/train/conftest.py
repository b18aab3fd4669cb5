"""What several tests of the training share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import TrainConfig
from pipeline.models.loading import load_tokenizer
from pipeline.train.job import TokenRow
from pipeline.train.trainer import Trainer
from tests.made_adapters import made_training


@pytest.fixture
def trainer(tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """Build the step's trainer of sixteen rows: trainer(base=folder, **train settings)."""

    def make(base: Path = tiny_llama, **settings: Any) -> Any:
        rows = [TokenRow([3 + number] * 8, [0] * 4 + [1] * 4) for number in range(16)]
        config = TrainConfig.model_validate({"rank": 4, "batch_size": 2, **settings})
        return Trainer(made_training(base, tmp_path, rows, config), load_tokenizer(tiny_llama))

    return make
