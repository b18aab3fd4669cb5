"""What is tried next: the same for the same past, in whatever process."""

from collections.abc import Mapping
from typing import Any

from pipeline.artifacts import CurvePoint, Trained
from pipeline.config import TrainConfig
from pipeline.train.search import TrialState, suggest

SPACE = {
    "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "rank": {"low": 4, "high": 64},
    "method": ["lora", "dora"],
    "targets": [["mlp"], ["all-linear"]],
}


def tried(settings: Mapping[str, Any], loss: float | None) -> TrialState:
    """Return a trial with this last dev loss, or one that failed."""
    trained: Any = Trained.model_construct
    made = None if loss is None else trained(dev_curve=(CurvePoint(step=1, loss=loss),))
    outcome: Any = "failed" if loss is None else "finished"
    return TrialState.model_construct(number=1, settings=dict(settings), outcome=outcome, once=made, dev_loss=loss)


def searched(count: int, train: TrainConfig, past: list[TrialState] | None = None) -> list[TrialState]:
    """Let a search go on for so many trials, each as good as its learning rate is near to 1e-3."""
    past = list(past or [])
    for _ in range(count):
        settings = suggest(train, past)
        if settings is None:
            break
        past.append(tried(settings, abs(settings["learning_rate"] - 1e-3)))
    return past


def tpe(**more: Any) -> TrainConfig:
    return TrainConfig.model_validate({"search": {"method": "tpe", "trials": 12, "space": SPACE, **more}})


def test_optuna_draws_the_same_in_one_go_and_after_a_restart() -> None:
    whole = searched(12, tpe())
    assert searched(7, tpe(), whole[:5]) == whole
    assert len(whole) == 12
    for one in whole:
        TrainConfig.model_validate(one.settings)
        assert 1e-5 <= one.settings["learning_rate"] <= 1e-2
        assert isinstance(one.settings["rank"], int)
    assert len({repr(one.settings) for one in whole}) == 12
    assert searched(3, tpe().model_copy(update={"seed": 7}))[0] != whole[0]
    # What failed is told to Optuna, too.
    past = [tried(one.settings, 2.0 if index % 2 else None) for index, one in enumerate(whole[:8])]
    assert suggest(tpe(), past) is not None


def test_trials_that_run_at_the_same_time_have_other_settings() -> None:
    past = searched(6, tpe())
    settings = suggest(tpe(), past)
    assert settings is not None
    running, failed = (TrialState(number=7, settings=settings, outcome=outcome) for outcome in ("running", "failed"))
    assert suggest(tpe(), [*past, running]) != suggest(tpe(), [*past, failed]), "Optuna avoids what is running"
    rates = tpe(space={"learning_rate": [1e-4, 1e-3]})
    assert suggest(rates, [TrialState(number=1, settings={"learning_rate": 1e-4})]) == {"learning_rate": 1e-3}


def test_a_search_ends_with_its_trials_or_when_all_was_tried() -> None:
    assert len(searched(5, tpe(trials=3))) == 3
    rates = [1e-4, 1e-3]
    found = searched(9, tpe(space={"learning_rate": rates}))
    assert sorted(one.settings["learning_rate"] for one in found) == rates
