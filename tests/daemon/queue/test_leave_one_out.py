"""While a track has nothing else to do, its champion's drops are left out one by one, to see what each is worth."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlmodel import Session, col, select

from daemon.queue import drops, leave_one_out, order, suspects
from daemon.queue.attempt_ends import Then
from daemon.queue.states import Claim
from daemon.settings.model import Settings, SuspectSettings
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import AWAITING
from daemon.state.tables import Drop, Run, Track
from daemon.state.troubles import Troubles
from pipeline.artifacts import Verdict
from pipeline.config import RunConfig
from tests import run_owner
from tests.daemon.queue.test_suspects import DAY, QUIET, WINS, WORSE, Box, in_snapshot

LOST = QUIET.model_copy(update={"gain": -1.8, "interval": (-3.2, -0.8)})
WON = WINS.model_copy(update={"gain": 3.0, "interval": (1.0, 5.0)})


class Idle(Box):
    """A database in which an idle track leaves out its champion's drops."""

    def allow(self, trials: int) -> None:
        super().allow(trials)
        self.set(suspects=SuspectSettings(leave_one_out=True))

    def set(self, **values: object) -> None:
        self.settings = self.settings.model_copy(update=values)
        self.looked = (0, 0)  # settings change with a restart alone

    def champion(self) -> str | None:
        with transaction(self.engine) as session:
            return session.get_one(Track, "default").champion_model_id

    def end(self, run: Run, verdict: Verdict, outcome: str = "", against: str | None = None) -> None:
        """End a run as `apply_verdict` does; with an `outcome` of its own, a win is not promoted yet."""
        said = verdict.model_copy(update={"champion_model_id": against or self.champion()})

        def still(session: Session, held: Run) -> None:
            suspects.follow_verdict(session, self.settings, held, said, self.now, serve=run_owner.unsettled)
            leave_one_out.follow_verdict(session, held, said, self.now)

        if said.outcome == "promoted" and not outcome:
            self.serve(run)
        ending = (outcome or said.outcome, said)
        run_owner.finish(self.engine, Claim(run.id or 0, run.token or ""), ending, self.tick(), still)

    def go_on(self) -> None:
        super().go_on()
        tracks = leave_one_out.tracks_of(self.settings)
        self.looked = leave_one_out.go_on(self.engine, self.settings, tracks, self.now, Troubles(), self.looked)

    def worth(self) -> list[tuple[int | None, int | None, object, object]]:
        """Return drop, run, points and half the interval's width of each value that was recorded."""
        with transaction(self.engine) as session:
            found = session.exec(
                select(Drop).where(col(Drop.worth_run).is_not(None)).order_by(col(Drop.worth_run))
            ).all()
        return [(one.id, one.worth_run, one.worth_points, one.worth_half_width) for one in found]

    def left_out(self) -> list[int | None]:
        with transaction(self.engine) as session:
            found = select(Run.about_drop).where(Run.purpose == "left_out").order_by(col(Run.id))
            return list(session.exec(found).all())


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Idle]:
    """A champion that was trained on drops 1, 2 and 3."""
    made = Idle(tmp_path / "state.db")
    for _ in range(3):
        made.drop()
    made.end(made.claim(), WINS)
    yield made
    made.engine.dispose()


# --- which run is queued, and when


def test_each_drop_is_left_out_once_per_champion_the_oldest_first_under_another_seed(box: Idle) -> None:
    pinned = box.drop("heldout")
    for left, used in ((1, [2, 3]), (2, [1, 3]), (3, [1, 2])):
        run = box.next_trial()
        assert in_snapshot(run) == [*used, pinned]
        assert RunConfig.model_validate(run.config).train.seed == 42 + (run.id or 0)
        box.forget()
        box.end(run, LOST)
        assert box.left_out()[-1] == left
    assert box.trial() is None
    box.drop()
    box.end(box.claim(), WINS)
    assert in_snapshot(box.next_trial()) == [2, 3, pinned, 5], "another champion"


def test_a_track_without_news_is_not_asked_again(box: Idle) -> None:
    for _ in range(3):
        box.end(box.next_trial(), LOST)
    box.go_on()
    asked: list[str] = []
    event.listen(box.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
    box.go_on()
    assert not any("FROM promotion" in one for one in asked)
    box.drop()
    box.end(box.claim(), WINS)
    assert box.trial() is not None, "another champion"


def _restored(box: Idle) -> None:
    box.withdraw(1)
    drops.restore(box.engine, 1, Word("right customer", box.tick()), box.settings)
    box.end(box.claim(), QUIET)


def _cancelled(box: Idle) -> None:
    run = box.next_trial()
    run_owner.leave(box.engine, Claim(run.id or 0, run.token or ""), box.tick(), Then.CANCEL)


@pytest.mark.parametrize("before", [_restored, _cancelled])
def test_a_drop_that_a_person_restored_or_whose_run_was_cancelled_is_not_left_out(
    box: Idle, before: Callable[[Idle], None]
) -> None:
    before(box)
    assert in_snapshot(box.next_trial()) == [1, 3]


def test_a_champion_of_one_drop_is_left_alone(tmp_path: Path) -> None:
    box = Idle(tmp_path / "state.db")
    box.drop()
    box.end(box.claim(), WINS)
    box.go_on()
    assert box.left_out() == []
    box.engine.dispose()


def test_the_runs_of_a_week_are_limited_and_leave_a_search_its_trials(box: Idle) -> None:
    box.allow(1)
    box.end(box.next_trial(), LOST)
    assert box.trial() is None
    box.drop()
    box.end(box.claim(), WORSE)
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 2, 3, 4]
    box.end(trial, QUIET)
    box.now += 6 * DAY
    assert box.trial() is None
    box.now += 2 * DAY
    assert in_snapshot(box.next_trial()) == [1, 3]


def _switched_off(box: Idle) -> None:
    box.set(suspects=Settings().suspects)


def _running(box: Idle) -> None:
    box.drop()
    box.claim()


def _searching(box: Idle) -> None:
    box.drop()
    box.end(box.claim(), WORSE)


def _paused(box: Idle) -> None:
    order.pause(box.engine, "default", Word("the GPU is needed", box.tick(), "ana"))


def _waiting_for_approval(box: Idle) -> None:
    box.drop()
    box.end(box.claim(), WINS, AWAITING)


def _waiting_for_the_night(box: Idle) -> None:
    box.set(trigger="nightly")
    with transaction(box.engine) as session:
        run_owner.add_drop(session)


def _withdrawn(box: Idle) -> None:
    box.withdraw(2)


@pytest.mark.parametrize(
    "before",
    [_switched_off, _running, _searching, _paused, _waiting_for_approval, _waiting_for_the_night, _withdrawn],
)
def test_no_drop_is_left_out_unless_the_settings_say_so_and_nothing_else_is_to_be_done(
    box: Idle, before: Callable[[Idle], None]
) -> None:
    before(box)
    box.go_on()
    assert box.left_out() == []


# --- what follows from its verdict


def test_the_verdict_says_what_the_drop_is_worth_and_blames_nothing(box: Idle) -> None:
    box.end(box.next_trial(), WORSE.model_copy(update={"gain": -1.8, "interval": (-3.2, -0.8)}))
    assert box.worth() == [(1, 2, 1.8, pytest.approx(1.2))]
    assert (box.order(), box.queued(), set(box.states().values())) == ([], [], {"accepted"})


@pytest.mark.parametrize(
    ("said", "against"),
    [(QUIET, None), (LOST.model_copy(update={"outcome": "contaminated"}), None), (LOST, "m9")],
    ids=["no gain", "contaminated", "another champion"],
)
def test_a_verdict_without_a_valid_comparison_gives_no_worth(box: Idle, said: Verdict, against: str | None) -> None:
    box.end(box.next_trial(), said, against=against)
    assert box.worth() == []


def test_a_model_that_is_better_without_a_drop_serves_and_the_drop_comes_back_as_new(box: Idle) -> None:
    box.end(box.next_trial(), WON)
    assert (box.champion(), box.worth()) == ("m2", [(1, 2, -3.0, 2.0)])
    box.forget()
    box.go_on()
    again = box.claim()
    assert (again.trigger, in_snapshot(again)) == ("drop", [1, 2, 3])
    box.end(again, WORSE)
    assert box.order() == [1]
    box.control(box.next_trial())
    assert box.states() == {1: "suspended", 2: "accepted", 3: "accepted"}
    assert in_snapshot(box.next_trial()) == [3], "the new champion's turn"


def test_a_win_that_waits_for_approval_brings_the_drop_back_once_when_it_serves(box: Idle) -> None:
    run = box.next_trial()
    box.end(run, WON, AWAITING)
    box.go_on()
    assert box.queued() == []
    box.serve(run)
    with transaction(box.engine) as session:
        held = session.get_one(Run, run.id)
        held.outcome = "promoted"
    box.go_on()
    assert len(box.queued()) == 1
    again = box.claim()
    assert in_snapshot(again) == [1, 2, 3]
    box.end(again, QUIET)
    assert in_snapshot(box.next_trial()) == [3], "it came back once"


# --- what happens meanwhile


def test_a_run_that_has_not_begun_ends_when_another_champion_comes(box: Idle) -> None:
    box.go_on()
    box.drop()
    box.end(box.claim(), WINS)
    box.go_on()
    assert (box.row(2).state, box.row(2).error) == ("cancelled", "another champion came before it began")
    assert box.left_out() == [1, 1]


def test_a_run_that_waits_when_a_search_opens_is_no_trial_and_no_control_of_it(box: Idle) -> None:
    box.go_on()
    box.drop()
    box.end(box.claim(), WORSE)
    left = box.next_trial()
    assert (left.id, in_snapshot(left)) == (2, [2, 3])
    box.end(left, WORSE.model_copy(update={"gain": -9.0, "interval": (-12.0, -6.0)}))
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 2, 3, 4]
    control = box.control(trial)
    assert in_snapshot(control) == [1, 2, 3]
    assert box.states()[4] == "suspended"


def test_a_run_ends_when_one_of_its_drops_is_withdrawn_but_not_for_the_drop_that_it_leaves_out(box: Idle) -> None:
    box.drop()
    box.end(box.claim(), QUIET)
    run = box.next_trial()
    assert in_snapshot(run) == [2, 3]
    assert box.withdraw(1).cancelled == []
    box.end(run, WON)
    box.go_on()
    assert (box.states()[1], box.queued()) == ("withdrawn", []), "no run without what is new since the champion"
    following = box.next_trial()
    assert in_snapshot(following) == [3]
    assert box.withdraw(3).cancelled == [following.id]


def test_a_win_during_a_search_brings_the_drop_back_when_the_search_has_ended(box: Idle) -> None:
    box.go_on()
    box.drop()
    box.end(box.claim(), WORSE)
    left = box.next_trial()
    box.end(left, WON)
    trial = box.next_trial()
    assert (in_snapshot(trial), box.queued()) == ([2, 3, 4], [])
    box.end(trial, QUIET)
    box.go_on()
    assert in_snapshot(box.claim()) == [1, 2, 3, 4]


def test_after_a_rollback_no_drop_comes_back_and_none_is_left_out_twice(box: Idle) -> None:
    box.drop()
    box.end(box.claim(), QUIET)
    box.end(box.next_trial(), WON)
    box.roll_back("m1")
    box.go_on()
    assert (box.queued(), box.left_out()) == ([], [1, 2])
