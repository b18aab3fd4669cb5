"""The losses of a training, from a state folder that has been lived in."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.state import run_files
from pipeline import durable
from pipeline.artifacts import CurvePoint
from pipeline.contract import CURVE_NAME, Curve
from tests.made_artifacts import made_adapter

CURVE = Curve(loss=(CurvePoint(step=1, loss=2.0),), dev=(CurvePoint(step=1, loss=2.5),))


def test_the_curve_is_that_of_the_latest_attempt_and_then_of_what_was_trained(lived_in: Any) -> None:
    root = lived_in.settings.state_folder
    assert run_files.load_curve(root, 3) is None
    for number, curve in ((1, Curve()), (2, CURVE)):
        folder = root / f"runs/3/attempts/train-{number}"
        folder.mkdir(exist_ok=True)
        durable.write_hint(folder / CURVE_NAME, curve.model_dump())
        os.utime(folder / CURVE_NAME, (number, number))
    assert run_files.load_curve(root, 3) == CURVE
    trained = (CurvePoint(step=9, loss=0.5),)
    spec: Any = SimpleNamespace(config=SimpleNamespace(base_model_id="b"), folder="runs/3/attempts/train-2")
    adapter = made_adapter(spec, loss_curve=trained)
    durable.write_json(root / "runs/3/train.json", adapter.model_dump(mode="json"))
    assert run_files.load_curve(root, 3) == Curve(loss=trained, dev=adapter.dev_curve)


@pytest.mark.parametrize("damage", [b"{", b'{"loss": 1}'])
def test_a_curve_that_cannot_be_read_is_none(lived_in: Any, damage: bytes) -> None:
    root = lived_in.settings.state_folder
    (root / "runs/3/attempts/train-1" / CURVE_NAME).write_bytes(damage)
    assert run_files.load_curve(root, 3) is None
