"""The settings in which a run differs from the run that made the champion."""

from typing import Any

from daemon.views.overview import Overview
from daemon.views.reports import changes_since_champion


def test_settings_are_compared_with_those_of_the_champions_run_except_values_left_to_the_run(lived_in: Any) -> None:
    overview = Overview(lived_in.settings.state_folder)
    changed = "'$.train.rank', 64, '$.salt', 'other', '$.evaluate.metric', 'rougeL', '$.evaluate.batch_size', 4"
    with lived_in.engine.begin() as base:
        base.exec_driver_sql(f"UPDATE run SET config = json_set(config, {changed}) WHERE id = 2")
    found = changes_since_champion(overview, overview.run(2))
    assert found is not None
    assert found.against == 1
    assert [(one.name, one.first, one.second) for one in found.settings] == [("train.rank", 16, 64)]
    same = changes_since_champion(overview, overview.run(3))
    assert same is not None
    assert same.settings == ()
    assert changes_since_champion(overview, overview.run(1)) is None, "it made the champion itself"
