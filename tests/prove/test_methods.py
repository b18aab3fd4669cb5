"""
Each way to train learns the demo's task, night by night, and what it made is promoted.

On SmolLM2-135M, by `make prove` alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.decide.explain import clauses, sentence
from tests.prove.conftest import Ground
from tests.prove.tasks import desk_task

pytestmark = pytest.mark.timeout(7200)
#: Rows of a drop, of which the track's salt holds out 96 on average, and how many records a verdict is to need.
ROWS, LEAST = 240, 60
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"method": "dora"},
    "rslora": {"rslora": True},
    "galore": {"method": "galore"},
    "spectrum": {"method": "spectrum"},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_each_method_trains_is_promoted(
    ground: Ground, tmp_path: Path, way: str, record_property: Callable[[str, Any], None]
) -> None:
    box = ground.box(tmp_path / "box", least=LEAST, **{"quantization": "none", "epochs": 2, **WAYS[way]})
    box.drop("honest.jsonl", desk_task(1).rows(ROWS))
    night = box.night()
    record_property("table", f"{way}: {sentence(clauses(night.verdict))}")
    assert night.run.outcome == "promoted"
    assert box.champion != ground.base.resolve()
