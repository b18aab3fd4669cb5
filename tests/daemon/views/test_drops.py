"""The champion that a withdrawn drop is still in, and the way back from it that is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from daemon.state.database import transaction
from daemon.state.states import HookState
from daemon.state.tables import Promotion
from tests.daemon.champions.test_approval import House


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Give a house in which nobody is asked."""
    return House(tmp_path, "")


def test_the_way_back_that_is_named_is_not_to_an_unhealthy_model(house: House, dropforge: Callable[..., Any]) -> None:
    for _ in range(2):
        house.run()
    with transaction(house.daemon.engine) as session:
        row = session.exec(select(Promotion).where(Promotion.generation == 1)).one()
        row.health_state = HookState.FAILED
        session.add(row)
    assert "rollback --track default --to 0 " in dropforge("drops", "withdraw", "2", "--reason", "deletion").out


def test_the_champion_that_is_named_was_trained_on_no_withdrawn_drop(
    house: House, dropforge: Callable[..., Any]
) -> None:
    for _ in range(2):
        house.run()
    house.withdraw(1)
    said = dropforge("drops", "withdraw", "2", "--reason", "deletion").out
    assert "generation 2, was trained on it; to let the latest one without withdrawn drops serve: " in said
    assert "dropforge rollback --track default --to 0 --reason TEXT" in said


def test_where_every_former_champion_has_a_withdrawn_drop_none_is_named(
    house: House, dropforge: Callable[..., Any]
) -> None:
    for _ in range(2):
        house.run()
    house.withdraw(1)
    (house.folder / "base").rename(house.folder / "elsewhere")
    said = dropforge("drops", "withdraw", "2", "--reason", "deletion").out
    words = "every former one has withdrawn drops, lost its place by a rollback or is gone"
    assert f"generation 2, was trained on it; {words}: dropforge history --track default\n" in said
    assert "dropforge rollback" not in said
