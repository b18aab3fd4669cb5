"""What a search knows of its trials when a process begins anew."""

from pathlib import Path

import pytest

from pipeline.train.checkpoints import publish
from pipeline.train.search.trial_files import MOST_DEATHS, Begun, Ended, TrialFiles


@pytest.fixture
def files(tmp_path: Path) -> TrialFiles:
    files = TrialFiles(tmp_path / "checkpoints")
    files.claim("mark")
    return files


def checkpoint(files: TrialFiles, step: int) -> None:
    source = files.folder / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"w")
    publish(source, files.trial(1), step, "mark")


def test_a_trial_is_there_from_when_it_was_thought_of(files: TrialFiles) -> None:
    assert files.begun(1) is None
    files.write(Begun(number=1, settings={"rank": 8}))
    assert files.begun(1) == Begun(number=1, settings={"rank": 8})
    assert files.ended() == []


def test_vanished_processes_are_counted_until_one_gets_further(files: TrialFiles) -> None:
    files.write(Begun(number=1, settings={}))

    def enter() -> int:
        found = files.begun(1)
        assert found is not None
        return files.enter(found).deaths

    assert [enter(), enter(), enter()] == [0, 1, 2]
    assert MOST_DEATHS == 2
    checkpoint(files, 5)
    assert [enter(), enter()] == [1, 2], "it had got further, so that was the first of a new row"


def test_who_leaves_in_order_is_no_death_and_its_time_counts(files: TrialFiles) -> None:
    begun = Begun(number=1, settings={})
    for _ in range(3):
        begun = files.enter(begun)
        files.leave(begun, seconds=2.0)
        found = files.begun(1)
        assert found is not None
        begun = found
    assert (begun.deaths, begun.seconds, begun.running) == (0, 6.0, False)


def test_a_trial_that_ended_keeps_no_checkpoints(files: TrialFiles) -> None:
    files.write(Begun(number=1, settings={}))
    checkpoint(files, 5)
    ended = Ended(number=1, settings={"rank": 8}, outcome="finished", losses=(1.5, 1.0), scores=(1.0,))
    files.end(ended)
    assert files.ended() == [ended]
    assert not list(files.trial(1).glob("step-*"))


def test_another_search_forgets_the_trials_of_the_one_before(files: TrialFiles) -> None:
    files.write(Begun(number=1, settings={}))
    files.end(Ended(number=1, settings={}, outcome="failed", why="x"))
    files.claim("mark")
    assert len(files.ended()) == 1
    files.claim("other")
    assert files.ended() == []
