"""What goes on now, from a state folder that has been lived in."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from daemon.queue import run_queue
from daemon.state import run_files
from daemon.views.now import look, stages
from daemon.views.overview import NotThere, Overview
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
    assert look(Overview(root)).curve is None


def test_each_stage_is_done_running_or_to_do(lived_in: Any) -> None:
    root = lived_in.settings.state_folder
    durable.write_json(root / "runs/3/prepare.json", {})
    found = stages(Overview(root), 3)
    assert [(one.step, one.state) for one in found] == [
        ("prepare", "done"),
        ("train", "running"),
        ("merge", "to do"),
        ("evaluate", "to do"),
        ("decide", "to do"),
    ]
    assert found[0].seconds == 60
    assert found[1].seconds is not None
    with pytest.raises(NotThere):
        stages(Overview(root), 99)


def test_damage_in_what_a_run_published_ends_no_look(lived_in: Any) -> None:
    root = lived_in.settings.state_folder
    (root / "runs/3/prepare.json").write_text("{")
    (root / "runs/3/train.json").write_text("{")
    assert look(Overview(root)).run is not None


def test_nothing_runs_between_runs(lived_in: Any) -> None:
    claim = run_queue.rescue(lived_in.engine, lived_in.tick())[0]
    run_queue.interrupt(lived_in.engine, claim, lived_in.tick())
    now = look(Overview(lived_in.settings.state_folder))
    assert (now.run, now.stages, now.curve) == (None, (), None)
    assert [run.id for run in now.queue] == [3]
    assert [run.id for run in now.latest] == [2, 1]
