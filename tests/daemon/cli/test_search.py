"""`search`: what it begins, what it says of it, and what it wants first."""

from collections.abc import Callable
from typing import Any

from daemon.state.database import transaction
from daemon.state.tables import Run

Command = Callable[..., Any]


def write(lived_in: Any, text: str) -> None:
    path = lived_in.folder / "dropforge.toml"
    path.write_text(f"{path.read_text()}\n{text}\n")


def test_a_search_is_queued_and_says_how_much_it_tries(lived_in: Any, dropforge: Command) -> None:
    write(lived_in, "[train.search]\nwhen = 'asked'\nspace = { learning_rate = [1e-4, 4e-4], rank = [4, 8] }")
    ended = dropforge("search")
    said = "run 4 searches on 4 rows in 4 trials; it begins next, once the daemon runs: dropforge run\n"
    assert (ended.code, ended.out) == (0, said), ended.err
    with transaction(lived_in.engine) as session:
        assert session.get_one(Run, 4).purpose == "search"


def test_a_space_that_is_wrong_is_refused_by_each_command(lived_in: Any, dropforge: Command) -> None:
    write(lived_in, "[train.search.space]\nlearningrate = [1e-4, 2e-4]")
    ended = dropforge("status")
    assert ended.code == 2
    assert "train: search.space.learningrate: there is no setting train.learningrate; what can be tried: " in ended.err
