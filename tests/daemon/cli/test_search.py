"""`search`: what it begins, what it says of it, and what it wants first."""

from collections.abc import Callable
from typing import Any

import pytest

from daemon.state.database import transaction
from daemon.state.tables import Run

Command = Callable[..., Any]


def write(lived_in: Any, text: str) -> None:
    path = lived_in.folder / "dropforge.toml"
    path.write_text(f"{path.read_text()}\n{text}\n")


def test_a_search_is_queued_and_says_what_it_tries(lived_in: Any, dropforge: Command) -> None:
    space = "[train.search.space]\nlearning_rate = [1e-4, 4e-4]\ntargets = [['mlp'], ['q_proj', 'v_proj']]\n"
    write(lived_in, f"[train.search]\nwhen = 'asked'\nhours = 2\n{space}")
    ended = dropforge("search")
    assert ended.code == 0, ended.err
    first, *rest = ended.out.splitlines()
    assert "4 trials, all combinations, within 2 h; it begins once the daemon runs: dropforge run" in first
    assert rest == ["  learning_rate: 0.0001 and 0.0004", "  targets: mlp and q_proj, v_proj"]
    with transaction(lived_in.engine) as session:
        assert session.get_one(Run, int(first.split()[1])).trigger == "search"


def test_a_range_is_told_too(lived_in: Any, dropforge: Command) -> None:
    space = "rank = { low = 4, high = 64, log = true }, dropout = { low = 0, high = 0.1 }"
    write(lived_in, f"[train.search]\nmethod = 'tpe'\ntrials = 6\nspace = {{ {space} }}")
    said = dropforge("search").out.splitlines()
    assert "6 trials at most, chosen by Optuna (TPE);" in said[0]
    assert said[1:] == ["  rank: 4 to 64, by its logarithm", "  dropout: 0 to 0.1"]


@pytest.mark.usefixtures("lived_in")
def test_without_anything_to_try_it_is_refused_with_an_example(dropforge: Command) -> None:
    ended = dropforge("search")
    assert ended.code == 2
    assert "track default has nothing to search: [train.search.space] is empty" in ended.err
    assert "as space = { learning_rate = [1e-4, 2e-4, 4e-4], rank = [8, 32] }" in ended.err


def test_a_space_that_is_wrong_is_refused_by_each_command(lived_in: Any, dropforge: Command) -> None:
    write(lived_in, "[train.search.space]\nlearningrate = [1e-4, 2e-4]")
    ended = dropforge("status")
    assert ended.code == 2
    assert "train: search.space.learningrate: there is no setting train.learningrate; did you mean" in ended.err
