"""The table [train.search]: what may be tried, and what is refused with the way out."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.artifacts import Trial
from pipeline.config import TrainConfig
from pipeline.search_settings import grid, most_trials, trial_words, with_settings
from pipeline.train.search import suggest


def train(**search: Any) -> TrainConfig:
    return TrainConfig.model_validate({"rank": 8, "search": search})


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"space": {"zebra": [1, 2]}}, "there is no setting train.zebra; what can be tried: alpha, batch_size, "),
        ({"space": {"rank": [8, 0]}}, "search.space.rank has 0: Input should be greater than or equal to 1"),
        ({"space": {"epochs": [1, 0]}}, "search.space.epochs has 0: Input should be greater than or equal to 0.001"),
        ({"space": {"rank": [8, 8]}}, "search.space.rank must have values that differ"),
        ({"space": {"max_length": [256, 512]}}, "search.space.max_length: all trials share it"),
        ({"space": {"quantization": ["nf4", "none"]}}, "search.space.quantization: all trials share it"),
        ({"space": {"rank": {"low": 8, "high": 64}}}, 'a grid needs values: list them, or set search.method = "tpe"'),
        ({"space": {"rank": list(range(1, 10))}}, "9 combinations, and search.trials = 8: raise search.trials"),
        ({"method": "tpe", "space": {"rank": {"low": 9, "high": 8}}}, "low must be below high"),
        ({"method": "tpe", "space": {"dropout": {"low": 0, "high": 0.5, "log": True}}}, "with log = true above 0"),
        ({"method": "tpe", "space": {"rank": {"low": 4.5, "high": 8}}}, "search.space.rank has 4.5: Input should be"),
        ({"method": "tpe", "space": {"rslora": {"low": 0, "high": 1}}}, "train.rslora is not a number"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_way_out(search: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        train(**search)
    assert words in str(raised.value)


def test_the_numbers_of_an_automatic_setting_can_be_searched() -> None:
    space = {"learning_rate": {"low": 1e-4, "high": 1e-3, "log": True}, "epochs": {"low": 1, "high": 4}}
    settings = suggest(train(method="tpe", space=space), [])
    assert settings is not None
    assert 1e-4 <= settings["learning_rate"] <= 1e-3
    assert 1 <= settings["epochs"] <= 4
    assert train(space={"learning_rate": ["auto", 2e-3]}).search.space["learning_rate"] == ("auto", 2e-3)


def test_a_grid_has_all_combinations_in_its_order() -> None:
    search = train(space={"rank": [8, 16], "rslora": [True, False], "targets": [["mlp"]]}).search
    assert list(grid(search)) == [
        {"rank": 8, "rslora": True, "targets": ("mlp",)},
        {"rank": 8, "rslora": False, "targets": ("mlp",)},
        {"rank": 16, "rslora": True, "targets": ("mlp",)},
        {"rank": 16, "rslora": False, "targets": ("mlp",)},
    ]
    assert most_trials(search) == 4
    assert most_trials(train(method="tpe", trials=3, space={"rank": [8, 16]}).search) == 3


def test_a_trial_has_its_own_settings_and_no_search() -> None:
    whole = TrainConfig.model_validate({"seed": 7, "search": {"space": {"rank": [8, 16], "epochs": [1, 2]}}})
    trial = with_settings(whole, {"rank": 16, "epochs": 2})
    assert (trial.rank, trial.epochs, trial.learning_rate, trial.seed) == (16, 2.0, "auto", 7)
    assert not trial.search.space


def test_a_search_survives_its_way_through_json() -> None:
    space = {"rank": {"low": 8, "high": 64, "log": True}, "rslora": [True, False], "targets": [["mlp"], ["q_proj"]]}
    whole = train(method="tpe", space=space)
    assert TrainConfig.model_validate_json(whole.model_dump_json()) == whole
    assert whole.decisive() != train(method="tpe", space={"rank": [8, 16]}).decisive()


def test_a_trial_is_told_in_a_line() -> None:
    chosen = Trial(
        number=2,
        settings={"learning_rate": 4e-4, "rslora": True, "targets": ["q_proj", "v_proj"]},
        outcome="finished",
        dev_loss=0.5,
        seconds=70,
        chosen=True,
    )
    assert trial_words(chosen) == (
        "2. learning_rate 0.0004, rslora True, targets q_proj and v_proj: finished, dev loss 0.500, 1 min 10 s, chosen"
    )
    failed = Trial(number=3, settings={"rank": 8}, outcome="failed", seconds=1, why="training diverged")
    assert trial_words(failed) == "3. rank 8: failed, 1 s; training diverged"
