"""A champion on watch through the dispatcher: which drops count, what ends a watch, and how the champion goes back."""

import errno
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import col, select

from daemon.champions import decisions
from daemon.champions.watch import read_watch
from daemon.dispatch import apply_verdict
from daemon.dispatch.stale_steps import retry
from daemon.messages.texts import text_of
from daemon.queue import drops, run_queue
from daemon.settings.model import GateSettings, Settings
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.tables import Drop, Event, Promotion
from daemon.storage.retention import what_is_in_use
from daemon.views.attention import Attention, attention
from daemon.views.overview import Overview
from pipeline.contract import StepResult, StepSpec
from pipeline.decide.watch import Watch
from tests.daemon.dispatch.test_dispatcher import NOW, Box, ScriptedExecutor, settled_by_control
from tests.made_artifacts import good_result, made_report

LIMITS = ["champion_doubted", "return_proposed"]


class Nights(ScriptedExecutor):
    """On each fresh drop the champion is better by so many points."""

    points = -5.0

    def good(self, spec: StepSpec) -> StepResult:
        if spec.step != "evaluate" or spec.watched is None or not spec.fresh_drops:
            return super().good(spec)
        watch = dict.fromkeys(spec.fresh_drops, self.points)
        return good_result(spec, made_report(spec, watched=spec.watched.generation, watch=watch))


class Nightly(Box):
    """Two champions, of the generations 1 and 2, and then nights with a drop each."""

    executor: Nights

    def __init__(self, engine: Engine, settings: Settings) -> None:
        super().__init__(engine, settings, Nights())
        for _ in range(2):
            self.night("promoted")

    def night(self, outcome: str = "not_shown_better", points: float = -5.0, drops: int = 1) -> StepSpec:
        """Let a run with so many new drops end; return the spec of its evaluation."""
        self.executor.outcome, self.executor.points = outcome, points
        for number in range(drops):
            self.drop(f"{len(self.executor.submitted)}-{number}")
        self.ticks(now=NOW + 10**7)
        return next(spec for spec in reversed(self.executor.submitted) if spec.step == "evaluate")

    @property
    def watch(self) -> Watch | None:
        with transaction(self.engine) as session:
            return read_watch(session, "default")

    @property
    def counts(self) -> tuple[int, int, int, int]:
        watch = self.watch
        assert watch is not None
        return watch.former, watch.nights, watch.worse, watch.better

    @property
    def champions(self) -> list[Promotion]:
        with transaction(self.engine) as session:
            return list(session.exec(select(Promotion).order_by(col(Promotion.generation))))

    def events(self) -> list[Event]:
        kinds = [*LIMITS, "rolled_back"]
        with transaction(self.engine) as session:
            return list(session.exec(select(Event).where(col(Event.kind).in_(kinds)).order_by(col(Event.id))))

    def told(self) -> list[Attention]:
        return [one for one in attention(self.settings, Overview.of(self.settings)) if one.kind == "return"]

    def back(self, **to: Any) -> None:
        decisions.rollback(self.engine, self.settings.work_folder, "default", Word("it swears", NOW), **to)


@pytest.fixture
def nightly(engine: Engine, settings: Settings) -> Nightly:
    return Nightly(engine, settings)


def asked(spec: StepSpec) -> tuple[int | None, tuple[int, ...]]:
    return None if spec.watched is None else spec.watched.generation, spec.fresh_drops


def test_each_later_drop_is_compared_once_and_a_new_champion_meets_the_same_former_one(nightly: Nightly) -> None:
    evaluations = [spec for spec in nightly.executor.submitted if spec.step == "evaluate"]
    assert [asked(spec) for spec in evaluations] == [(None, ()), (None, ())], "a base model is not watched"
    assert asked(nightly.night()) == (1, (3,))
    assert asked(nightly.night(points=2.0, drops=2)) == (1, (4, 5)), "drop 3 was compared"
    assert nightly.counts == (1, 2, 1, 2)
    assert asked(nightly.night("promoted", points=0.0)) == (1, (6,))
    assert nightly.counts == (1, 3, 1, 2), "a tie is a night, and counts for none"
    assert asked(nightly.night("promoted")) == (1, (7,))
    assert asked(nightly.night("worse")) == (1, ()), "its trial, which has no fresh drop"
    assert nightly.counts == (1, 5, 3, 2)
    with transaction(nightly.engine) as session:
        compared = session.exec(select(Drop.watch_run, Drop.watch_points).order_by(col(Drop.id))).all()
    assert compared == [(None, None)] * 2 + [(3, -5.0), (4, 2.0), (4, 2.0), (5, 0.0), (6, -5.0), (7, -5.0)]


def test_a_later_former_champion_is_watched_once_the_watch_is_over(nightly: Nightly) -> None:
    nightly.night("promoted", points=5.0)
    nightly.night(points=5.0, drops=7)
    assert asked(nightly.night(points=5.0)) == (1, (11,))
    assert nightly.watch is not None
    assert nightly.watch.is_over
    assert asked(nightly.night()) == (2, (12,))
    assert nightly.counts == (2, 1, 1, 0)


def test_twelve_lost_drops_are_told_once_each_and_a_person_goes_back_by_the_command(nightly: Nightly) -> None:
    for lost in range(12):
        nightly.night()
        assert len(nightly.told()) == (lost >= 7)
        assert [event.kind for event in nightly.events()] == LIMITS[: (lost >= 7) + (lost >= 10)]
    assert [row.generation for row in nightly.champions] == [0, 1, 2]
    words = "generation 1 answered 11 of the last 11 new drops better than the champion"
    with transaction(nightly.engine) as session:
        doubt, proposal = (text_of(session, event) for event in nightly.events())
    assert doubt is not None
    assert proposal is not None
    assert (doubt.level, doubt.title) == ("warning", "[dropforge] IN DOUBT: default")
    assert doubt.body.splitlines() == [
        "generation 1 answered 8 of the last 8 new drops better than the champion: evidence 28",
        "a return is proposed at evidence 100",
        "all champions: dropforge history --track default",
    ]
    assert proposal.title == "[dropforge] RETURN PROPOSED: default"
    assert proposal.body.splitlines()[:2] == [
        f"{words}: evidence 171",
        f"to let it serve again: dropforge rollback --track default --to 1 --reason '{words}'",
    ]
    nightly.back(to=1)
    assert (nightly.watch, nightly.told()) == (None, [])


def test_with_auto_the_champion_goes_back_by_itself_and_the_watch_ends(nightly: Nightly) -> None:
    nightly.settings = nightly.settings.model_copy(update={"gate": GateSettings(**{"return": "auto"})})
    del nightly.dispatcher
    for _ in range(10):
        nightly.night()
    assert nightly.champions[-1].generation == 2
    assert asked(nightly.night()) == (1, (13,))
    back = nightly.champions[-1]
    assert (back.kind, back.generation, back.restored, back.approved_by) == ("rollback", 3, 1, None)
    assert back.reason == "generation 1 answered 11 of the last 11 new drops better than the champion"
    assert [event.kind for event in nightly.events()] == [*LIMITS, "rolled_back"]
    assert (nightly.watch, nightly.told()) == (None, [])
    assert asked(nightly.night()) == (None, ()), "no other former champion is left"
    assert nightly.run(13).outcome == "not_shown_better"


def test_a_return_that_was_cut_off_or_refused_is_made_at_the_end_of_the_next_run(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch
) -> None:
    nightly.settings = nightly.settings.model_copy(update={"gate": GateSettings(**{"return": "auto"})})
    del nightly.dispatcher
    with monkeypatch.context() as dead:
        dead.setattr(apply_verdict, "_go_back", lambda *_: None)
        nightly.night(drops=11)
    model = nightly.settings.work_folder / nightly.champions[1].model_path / "config.json"
    whole = model.read_bytes()
    model.write_bytes(b"{}")
    nightly.night()
    assert nightly.champions[-1].generation == 2, "its files have changed"
    assert (nightly.run(4).state, nightly.dispatcher.idle) == ("succeeded", True)
    model.write_bytes(whole)
    nightly.night("promoted")
    assert nightly.champions[-1].kind == "promotion", "a new champion has its first drop to come"
    nightly.night()
    assert (nightly.champions[-1].kind, nightly.champions[-1].restored) == ("rollback", 1)


def test_a_trial_that_its_control_has_settled_has_its_first_drop_to_come(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch
) -> None:
    nightly.settings = nightly.settings.model_copy(update={"gate": GateSettings(**{"return": "auto"})})
    del nightly.dispatcher
    with monkeypatch.context() as refused:
        refused.setattr(apply_verdict, "_go_back", lambda *_: None)
        nightly.night(drops=12)
        nightly.executor.outcome = "promoted"
        settled_by_control(nightly)
    nightly.ticks()
    assert (nightly.champions[-1].kind, nightly.champions[-1].run_id) == ("promotion", 6)
    nightly.night()
    assert nightly.champions[-1].kind == "rollback"


def test_a_drop_that_is_taken_out_does_not_count_until_it_is_restored(nightly: Nightly) -> None:
    nightly.night(drops=3)
    nightly.night(points=5.0)
    drops.withdraw(nightly.engine, 4, Word("wrong", NOW), nightly.settings)
    assert nightly.counts == (1, 2, 2, 1)
    drops.withdraw(nightly.engine, 6, Word("wrong", NOW), nightly.settings)
    assert nightly.counts == (1, 1, 2, 0)
    drops.restore(nightly.engine, 4, Word("right", NOW), nightly.settings)
    assert nightly.counts == (1, 1, 3, 0)
    assert asked(nightly.night()) == (1, (7,)), "a drop is compared once"


def test_a_drop_is_compared_in_the_moment_in_which_its_run_ends_or_not_at_all(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    nightly.drop("c")
    nightly.executor.outcome = "not_shown_better"
    with monkeypatch.context() as broken:
        # The last that is done in this transaction.
        broken.setattr(apply_verdict, "sentence", full)
        with pytest.raises(OSError, match="disk full"):
            nightly.ticks()
    assert (nightly.watch, nightly.run(3).state) == (None, "running")
    nightly.ticks()
    assert (nightly.counts, nightly.run(3).state) == ((1, 1, 1, 0), "succeeded")


def test_a_comparison_with_a_champion_that_serves_no_more_does_not_count(nightly: Nightly) -> None:
    nightly.night("promoted")
    nightly.meanwhile("decide", lambda: nightly.back(to=2))
    nightly.night()
    evaluations = [asked(spec) for spec in nightly.executor.submitted if spec.step == "evaluate"]
    assert evaluations[-2:] == [(1, (4,)), (1, (4,))]
    assert nightly.counts == (1, 1, 1, 0), "the rollback has ended the watch of before"


def test_a_model_that_was_trained_on_held_out_records_says_nothing(nightly: Nightly) -> None:
    nightly.night("contaminated")
    assert nightly.watch is None


@pytest.mark.parametrize("to", [0, 1])
def test_a_rollback_ends_the_watch(nightly: Nightly, to: int) -> None:
    nightly.night("promoted", drops=3)
    nightly.back(to=to)
    assert nightly.watch is None
    assert asked(nightly.night()) == (None, ())


def test_the_files_of_the_former_champion_on_watch_are_kept(nightly: Nightly) -> None:
    for _ in range(6):
        nightly.night("promoted")
    paths = [nightly.settings.work_folder / row.model_path for row in nightly.champions]
    with transaction(nightly.engine) as session:
        kept = what_is_in_use(session, nightly.settings)
    assert [kept.holds(path) for path in paths[1:]] == [True, False, False, True, True, True, True, True]


def test_a_base_model_that_a_person_went_back_to_is_not_watched(nightly: Nightly) -> None:
    nightly.back(to=0)
    nightly.night("promoted")
    assert asked(nightly.night()) == (None, ())


def test_a_run_that_is_retried_after_a_later_one_is_no_night(nightly: Nightly) -> None:
    nightly.meanwhile("decide", lambda: run_queue.cancel(nightly.engine, 3, NOW))
    nightly.night()
    assert nightly.run(3).state == "cancelled"
    assert asked(nightly.night()) == (1, (3, 4))
    retry(nightly.engine, nightly.settings.work_folder, 3, NOW)
    nightly.ticks(now=NOW + 10**7)
    assert (nightly.run(3).state, nightly.counts) == ("succeeded", (1, 1, 2, 0))


def test_a_run_from_before_a_watch_that_ended_does_not_bring_its_nights_back(nightly: Nightly) -> None:
    nightly.night("promoted", points=0.0)
    nightly.meanwhile("train", lambda: run_queue.cancel(nightly.engine, 4, NOW))
    nightly.night()
    drops.withdraw(nightly.engine, 4, Word("wrong", NOW), nightly.settings)
    nightly.night(drops=11)
    assert (nightly.run(4).state, nightly.counts) == ("cancelled", (1, 2, 11, 0))
    nightly.back(to=2)
    drops.restore(nightly.engine, 4, Word("right", NOW), nightly.settings)
    retry(nightly.engine, nightly.settings.work_folder, 4, NOW)
    nightly.ticks(36, now=NOW + 10**7)
    assert nightly.run(4).state == "succeeded"
    assert nightly.counts == (1, 1, 1, 0)
