"""What a run was told otherwise than the run that made the champion."""

from typing import Any

from daemon.views.compare_runs import changes_since_champion
from daemon.views.overview import Overview


def test_a_run_is_held_against_the_one_that_made_the_champion(lived_in: Any) -> None:
    overview = Overview(lived_in.settings.state_folder)
    with lived_in.engine.begin() as base:
        base.exec_driver_sql("UPDATE run SET config = json_set(config, '$.train.rank', 64) WHERE id = 2")
    found = changes_since_champion(overview, overview.run(2))
    assert found is not None
    assert found.against == 1
    assert [(one.name, one.first, one.second) for one in found.settings] == [("train.rank", 16, 64)]
    same = changes_since_champion(overview, overview.run(3))
    assert same is not None
    assert same.settings == ()


def test_against_a_base_model_there_is_nothing_to_hold_a_run(lived_in: Any) -> None:
    overview = Overview(lived_in.settings.state_folder)
    assert changes_since_champion(overview, overview.run(1)) is None
