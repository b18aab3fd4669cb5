"""Drops that may have made a run worse are tried; only one that is also worse than a control is suspended."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy import Engine, delete, func
from sqlmodel import Session, col, select

from daemon.queue import drops, run_queue, states, suspects
from daemon.queue.attempt_ends import Then
from daemon.queue.states import Claim
from daemon.settings.model import Settings
from daemon.state.clauses import drop_clauses
from daemon.state.database import create, open_engine, transaction
from daemon.state.events import Word, record_event
from daemon.state.states import AWAITING, RunState
from daemon.state.tables import Drop, Event, Promotion, Run, Suspect, Track
from daemon.state.troubles import Troubles
from pipeline import durable
from pipeline.artifacts import TrialScores, Verdict
from pipeline.config import RunConfig
from tests import run_owner
from tests.chaos.faults import Death, Trouble
from tests.made_artifacts import made_report, made_spec
from tests.run_owner import add_drop, configure

DAY = 86_400_000


class Box:
    """A database in which runs come to the verdicts that a test gives them."""

    def __init__(self, path: Path, now: int = DAY) -> None:
        """Open the database at `path`, which is made if it is not there."""
        create(path)
        self.path, self.now, self.engine = path, now, open_engine(path)
        self.settled: list[int] = []
        """Trials that are to serve after their control."""
        self.allow(7)

    def allow(self, trials: int) -> None:
        """Set how many trials may begin in a week."""
        facts = {"state": str(self.path.with_suffix("")), "gate": {"trials_per_week": trials}}
        self.settings = Settings.model_validate({**facts, "run_after_quiet_seconds": 0})

    def tick(self) -> int:
        self.now += 1000
        return self.now

    def drop(self, role: str = "train") -> int:
        """Take a file in, which queues a run."""
        with transaction(self.engine) as session:
            states.ensure_track(session, "default", self.tick())
            drop = add_drop(session, role=role)
            if role == "train":
                run_queue.enqueue(session, "default", "drop", self.now, self.now)
            return drop

    def claim(self) -> Run:
        claim = run_owner.claim(self.engine, self.tick(), configure)
        assert claim is not None
        return self.row(claim.run_id)

    def end(self, run: Run, verdict: Verdict) -> None:
        """End a run as `apply_verdict` does."""

        def still(session: Session, held: Run) -> None:
            suspects.follow_verdict(session, self.settings, held, verdict, self.now, serve=self.settle)

        if verdict.outcome == "promoted":
            self.serve(run)
        self.tick()
        claim = Claim(run.id or 0, run.token or "")
        run_owner.finish(self.engine, claim, (verdict.outcome, verdict), self.now, still)

    def settle(self, trial: Run) -> None:
        """Note a trial that its control has settled, in place of its promotion."""
        self.settled.append(trial.id or 0)

    def control(self, trial: Run, p_value: float = 0.005, said: Verdict | None = None) -> Run:
        """End a trial with a verdict that blames its drop, then its control with `said`; return the control."""
        self.end(trial, WORSE)
        control = self.next_trial()
        self.compare(control, p_value)
        self.end(control, said or QUIET)
        return control

    def compare(self, control: Run, p_value: float | None, lost: tuple[int, ...] = (1,), groups: int = 120) -> None:
        """Publish a control's evaluation, as its step does; without a p-value it is not comparable with the trial."""
        spec = made_spec(self.settings.work_folder, "evaluate", run=control.id)
        Path(spec.root, spec.folder).mkdir(parents=True)
        scores = TrialScores(groups=groups, wins=5, losses=23, p_value=p_value or 0, lost_drops=lost)
        made = made_report(spec, trial=None if p_value is None else scores)
        durable.write_json(Path(spec.root, f"runs/{control.id}/evaluate.json"), made.model_dump(mode="json"))

    def serve(self, run: Run) -> None:
        """Make a run's model the champion."""
        self._crown(f"m{run.id}", run_id=run.id, reason="better", drops=in_snapshot(run))
        with transaction(self.engine) as session:
            record_event(session, "promoted", self.now, track="default", run_id=run.id)

    def roll_back(self, model: str) -> None:
        """Let an earlier champion serve again."""
        made = select(Promotion).where(Promotion.model_id == model).order_by(col(Promotion.generation))
        with transaction(self.engine) as session:
            former = session.exec(made).first()
        known = {"run_id": former.run_id, "drops": former.drops, "restored": former.generation} if former else {}
        self._crown(model, kind="rollback", reason="it disappointed", **{"restored": 0, **known})

    def _crown(self, model: str, **more: Any) -> None:
        with transaction(self.engine) as session:
            track = session.get_one(Track, "default")
            generation = (track.champion_generation or 0) + 1
            more |= {"generation": generation, "model_id": model, "model_path": "m", "created_at": self.now}
            session.add(Promotion(track="default", **more))
            track.champion_generation, track.champion_model_id = generation, model

    def go_on(self) -> None:
        suspects.go_on(self.engine, self.settings, self.tick(), Troubles())

    def propose(self, drop: int) -> None:
        """Let a drop have new answers to old questions."""
        with transaction(self.engine) as session:
            session.get_one(Drop, drop).new_answers = 9

    def withdraw(self, drop: int) -> drops.Withdrawal:
        return drops.withdraw(self.engine, drop, Word("wrong customer", self.tick()), self.settings)

    def cancel(self, run: Run) -> None:
        """Cancel a run, and let ordinary runs come to an end that changes nothing."""
        run_owner.leave(self.engine, Claim(run.id or 0, run.token or ""), self.tick(), Then.CANCEL)
        while self.queued():
            self.end(self.claim(), QUIET)

    def trial(self) -> Run | None:
        """Let the daemon be idle: queue the next trial, if there is one, and begin it."""
        self.go_on()
        claim = run_owner.claim(self.engine, self.tick(), configure)
        run = None if claim is None else self.row(claim.run_id)
        assert run is None or run.trigger == "idle", "an ordinary run goes first"
        return run

    def next_trial(self) -> Run:
        run = self.trial()
        assert run is not None
        return run

    def row(self, run_id: int) -> Run:
        with transaction(self.engine) as session:
            return session.get_one(Run, run_id)

    def states(self) -> dict[int, str]:
        """Return each drop's state, with what it is on trial for."""
        with transaction(self.engine) as session:
            tried = set(session.exec(select(Suspect.drop_id).where(col(Suspect.ended).is_(None))).all())
            rows = session.exec(select(Drop)).all()
        return {row.id or 0: "on trial" if row.id in tried else str(row.state) for row in rows}

    def queued(self) -> list[int]:
        """Return the ordinary runs that wait to begin."""
        with transaction(self.engine) as session:
            found = session.exec(select(Run).where(Run.state == RunState.QUEUED)).all()
        return [run.id or 0 for run in found]

    def order(self) -> list[int]:
        """Return the drops on trial in the order in which they are tried."""
        with transaction(self.engine) as session:
            open_ = select(Suspect.drop_id).where(col(Suspect.ended).is_(None))
            return list(session.exec(open_.order_by(col(Suspect.id))).all())

    def why(self, drop: int) -> list[str]:
        with transaction(self.engine) as session:
            return drop_clauses(session.get_one(Drop, drop))

    def forget(self) -> None:
        """Delete the events, but for the last one."""
        with transaction(self.engine) as session:
            last = select(func.max(Event.id)).scalar_subquery()
            session.exec(delete(Event).where(col(Event.id) < last))

    def events(self, kind: str) -> list[Event]:
        with transaction(self.engine) as session:
            return list(session.exec(select(Event).where(Event.kind == kind).order_by(col(Event.id))).all())


def verdict(outcome: str = "not_shown_better", *, blames: bool = False) -> Verdict:
    return run_owner.judged(outcome, blames_new_drops=blames)


WORSE, QUIET, WINS = verdict("worse", blames=True), verdict(), verdict("promoted")


def in_snapshot(run: Run) -> list[int]:
    return run.snapshot or []


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """A champion that was trained on drop 1."""
    made = Box(tmp_path / "state.db")
    made.drop()
    made.end(made.claim(), WINS)
    yield made
    made.engine.dispose()


def blamed(box: Box, new: int, said: Verdict = WORSE) -> Run:
    """Take `new` drops and let the run on them come to a bad verdict."""
    for _ in range(new):
        box.drop()
    run = box.claim()
    box.end(run, said)
    return box.row(run.id or 0)


# --- what opens a search


def test_a_search_waits_for_a_running_run_of_its_track_whose_drops_it_would_call_unused(box: Box) -> None:
    blamed(box, 1)
    box.drop()
    running = box.claim()
    box.go_on()
    with transaction(box.engine) as session:
        assert session.exec(select(Run).where(Run.purpose == "trial")).all() == []
    box.end(running, QUIET)
    assert box.next_trial().state == "running"


def test_no_search_is_opened_by_a_verdict_that_blames_no_drop_or_where_every_drop_is_new(
    box: Box, tmp_path: Path
) -> None:
    blamed(box, 2, verdict("guard_failed"))
    assert (box.order(), box.trial()) == ([], None)
    new = Box(tmp_path / "new.db")
    blamed(new, 2)
    assert new.order() == []
    new.engine.dispose()


def test_a_drop_that_was_tried_goes_after_those_that_never_were(box: Box) -> None:
    blamed(box, 8)
    assert box.order() == [9, 8, 7, 6, 5, 4, 3, 2]
    while (trial := box.trial()) is not None:
        box.end(trial, QUIET)
    box.now += 8 * DAY
    blamed(box, 1)
    assert box.order() == [10, 2, 9, 8, 7, 6, 5, 4, 3]


# --- another champion than the trial was made for


def test_a_trial_that_has_not_begun_is_made_beside_the_champion_that_came(box: Box) -> None:
    blamed(box, 1)
    box.drop()
    box.go_on()
    ordinary = box.claim()
    box.end(ordinary, WINS)
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 2, 3]


def test_a_trial_that_lacks_a_drop_of_the_champions_is_made_again(box: Box) -> None:
    blamed(box, 1)
    trial = box.next_trial()
    box.drop()
    forced = Run(id=2, track="default", trigger="drop", created_at=0, not_before=0, snapshot=[1, 3])
    box.serve(forced)
    box.end(trial, QUIET)
    assert box.states() == {1: "accepted", 2: "on trial", 3: "accepted"}
    box.end(box.claim(), QUIET)
    again = box.next_trial()
    assert in_snapshot(again) == [1, 2, 3]
    box.control(again)
    assert box.states()[2] == "suspended"


def test_where_a_drop_of_the_champions_was_withdrawn_nothing_speaks_against_another(box: Box) -> None:
    blamed(box, 1)
    first = box.next_trial()
    box.end(first, WINS)
    box.withdraw(1)
    blamed(box, 1)
    assert box.states() == {1: "withdrawn", 2: "accepted", 3: "accepted"}


# --- a trial


def test_a_trial_is_the_champions_drops_and_one_suspect_under_another_seed(box: Box) -> None:
    pinned = box.drop("heldout")
    run = blamed(box, 2)
    trial = box.next_trial()
    assert (trial.purpose, trial.about_drop, in_snapshot(trial)) == ("trial", 4, [1, pinned, 4])
    assert run.config is not None
    assert trial.config is not None
    seeds = [RunConfig.model_validate(one.config).train.seed for one in (run, trial)]
    assert seeds == [42, 42 + (trial.id or 0)]
    with transaction(box.engine) as session:
        assert session.get_one(Drop, 4).first_run == run.id


def test_there_is_one_trial_at_a_time_and_ordinary_runs_go_first(box: Box) -> None:
    blamed(box, 2)
    box.go_on()
    box.go_on()
    assert len(box.events("trial_queued")) == 1
    new = box.drop()
    ordinary = box.claim()
    assert (ordinary.purpose, in_snapshot(ordinary)) == ("candidate", [1, new])
    box.end(ordinary, QUIET)
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 3]


def test_a_drop_whose_trial_is_worse_than_its_control_too_is_suspended_and_all_others_are_cleared_and_run(
    box: Box,
) -> None:
    pinned = box.drop("heldout")
    blamed(box, 3)
    assert [(one.drop_id, one.run_id) for one in box.events("drop_suspected")] == [(5, 2), (4, 2), (3, 2)]
    trial = box.next_trial()
    control = box.control(trial)
    assert (control.purpose, control.control_of, in_snapshot(control)) == ("control", trial.id, [1, pinned])
    assert control.config is not None
    assert RunConfig.model_validate(control.config).train.seed == 42 + (control.id or 0)
    assert box.states() == {1: "accepted", pinned: "accepted", 3: "accepted", 4: "accepted", 5: "suspended"}
    ways, submit = "If drop 5 corrects answers of drop 1, do one of these three", "dropforge submit FILE"
    assert box.why(5) == [
        "run 2 was worse with it, and so was run 3, which tried it alone",
        "the control, run 4, was better on 23 and worse on 5 of 120 groups of records: dropforge report 3",
        f"{ways} and then restore it: dropforge drops restore 5 --reason TEXT",
        "Withdraw what is out of date: dropforge drops withdraw 1 --reason TEXT",
        f"Or drop all prompts of drop 1 again with their new answers: {submit} --new-answers --track default",
        f'Or set gate.on = "pinned" and judge on held-out records of your own: {submit} --heldout --track default',
    ]
    assert box.queued() == [5]
    assert in_snapshot(box.claim()) == [1, pinned, 3, 4]
    assert box.trial() is None


@pytest.mark.parametrize(("p_value", "state"), [(0.006, "accepted"), (0.005, "suspended")])
def test_a_search_ends_with_its_control_whatever_that_shows(box: Box, p_value: float, state: str) -> None:
    blamed(box, 2)
    trial = box.next_trial()
    box.control(trial, p_value)
    assert box.states() == {1: "accepted", 2: "accepted", 3: state}
    assert box.settled == ([trial.id] if state == "accepted" else []), "what is not worse may serve"
    cleared = [one.drop_id for one in box.events("suspicion_ended") if one.detail["end"] == "cleared"]
    assert cleared == ([2, 3] if state == "accepted" else [2])
    if state == "accepted":
        assert box.trial() is None, "the champion was lucky, and all drops wait for the next run"


def test_a_trial_is_trained_from_the_base_as_its_control_has_no_new_row_to_continue_with(box: Box) -> None:
    def continued(session: Session, track: Track) -> RunConfig:
        config = configure(session, track)
        return config.model_copy(update={"train": config.train.model_copy(update={"start": "champion"})})

    blamed(box, 1)
    box.go_on()
    claim = run_owner.claim(box.engine, box.tick(), continued)
    assert claim is not None
    assert RunConfig.model_validate(box.row(claim.run_id).config).train.start == "base"


def test_two_drops_that_only_do_harm_together_are_found_and_named(box: Box) -> None:
    blamed(box, 2)
    box.end(box.next_trial(), QUIET)
    both = box.next_trial()
    assert in_snapshot(both) == [1, 2, 3]
    control = box.control(both)
    assert in_snapshot(control) == [1]
    assert box.states() == {1: "accepted", 2: "suspended", 3: "accepted"}
    assert box.why(2)[:3] == [
        "run 2 was worse with it, and so was run 4, which tried drops 2 and 3 together",
        "without drop 2 no harm was found",
        "the control, run 5, was better on 23 and worse on 5 of 120 groups of records: dropforge report 4",
    ]
    assert in_snapshot(box.claim()) == [1, 3]


ENDINGS: dict[str, Callable[[Box, Run], object]] = {
    "not shown better": lambda box, run: box.end(run, QUIET),
    "cancelled": Box.cancel,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_trial_that_does_not_blame_its_drop_clears_it_and_the_next_is_tried(box: Box, ending: str) -> None:
    blamed(box, 2)
    for number, kept in ((3, []), (2, [3] if ending == "not shown better" else [])):
        trial = box.next_trial()
        assert in_snapshot(trial) == [1, number, *kept]
        ENDINGS[ending](box, trial)
    assert box.trial() is None
    assert (set(box.states().values()), box.queued()) == ({"accepted"}, [])
    ends = [(one.drop_id, one.detail["end"]) for one in box.events("suspicion_ended")]
    assert ends == [(3, "cleared"), (2, "cleared")]


def test_a_trial_that_wins_is_the_champion_of_the_next_one_and_in_the_end_the_rest_is_run(box: Box) -> None:
    blamed(box, 3)
    for number, said, known in ((4, WINS, [1]), (3, QUIET, [1, 4]), (2, QUIET, [1, 3, 4])):
        trial = box.next_trial()
        assert in_snapshot(trial) == sorted([*known, number])
        assert box.queued() == []
        box.end(trial, said)
    assert len(box.queued()) == 1
    assert in_snapshot(box.claim()) == [1, 2, 3, 4]


def test_a_drop_that_the_champion_knows_by_then_is_not_tried_any_more(box: Box) -> None:
    box.serve(blamed(box, 2))
    assert (box.trial(), set(box.states().values())) == (None, {"accepted"})


def test_a_champion_that_knows_no_drop_ends_the_search(box: Box) -> None:
    blamed(box, 2)
    trial = box.next_trial()
    box.roll_back("base")
    box.end(trial, WORSE)
    assert (box.trial(), set(box.states().values())) == (None, {"accepted"})


def test_a_verdict_of_a_search_that_is_over_suspends_nobody_and_a_trial_opens_none(box: Box) -> None:
    blamed(box, 1)
    trial = box.next_trial()
    run_owner.leave(box.engine, Claim(trial.id or 0, trial.token or ""), box.tick(), Then.CANCEL)
    box.go_on()
    run_owner.retry(box.engine, trial.id or 0, box.tick())
    again = box.claim()
    assert (again.id, in_snapshot(again)) == (trial.id, [1, 2])
    box.end(again, WORSE)
    assert box.states() == {1: "accepted", 2: "accepted"}


# --- a control


def test_a_trial_is_made_again_if_its_control_cannot_be_compared_with_it_while_the_week_has_trials(box: Box) -> None:
    box.allow(3)
    blamed(box, 1)
    for _ in range(2):
        box.end(box.next_trial(), WORSE)
        control = box.next_trial()
        box.compare(control, None)
        box.end(control, QUIET)
        assert box.states()[2] == "on trial"
    assert (box.trial(), box.states()[2], box.settled) == (None, "accepted", []), "two trials and two controls began"


def test_a_trial_whose_control_has_no_record_in_common_with_it_is_neither_suspended_nor_served(box: Box) -> None:
    blamed(box, 1)
    box.end(box.next_trial(), WORSE)
    control = box.next_trial()
    box.compare(control, 1.0, groups=0)
    box.end(control, QUIET)
    assert (box.states()[2], box.settled) == ("accepted", [])


@pytest.mark.parametrize(("number", "joined"), [(1, (2, None)), (2, (None, None))])
def test_models_that_were_trained_in_another_way_are_not_judged_together(
    box: Box, number: int, joined: tuple[int | None, ...]
) -> None:
    """Run 1 made the champion, which only a control stands beside; run 2 was blamed."""
    blamed(box, 1)
    trial = box.next_trial()
    box.end(trial, WORSE)
    control = box.next_trial()
    with transaction(box.engine) as session:
        assert suspects.blamed_run(session, control) == 2
        other = session.get_one(Run, number)
        config = RunConfig.model_validate(other.config)
        other.config = config.model_copy(
            update={"train": config.train.model_copy(update={"start": "champion"})}
        ).model_dump()
        session.add(other)
        session.flush()
        assert tuple(suspects.blamed_run(session, run) for run in (trial, control)) == joined


def test_a_control_that_ends_without_a_verdict_clears_the_drop_which_no_later_trial_keeps(box: Box) -> None:
    blamed(box, 2)
    box.end(box.next_trial(), WORSE)
    control = box.next_trial()
    run_owner.leave(box.engine, Claim(control.id or 0, control.token or ""), box.tick(), Then.CANCEL)
    assert in_snapshot(box.next_trial()) == [1, 2]
    assert [one.drop_id for one in box.events("suspicion_ended")] == [3]


def test_a_trial_is_made_again_where_another_champion_comes_before_its_control_ends(box: Box) -> None:
    blamed(box, 1)
    box.end(box.next_trial(), WORSE)
    box.go_on()
    box.drop()
    box.end(box.claim(), WINS)
    again = box.next_trial()
    assert (box.row(4).state, in_snapshot(again)) == ("cancelled", [1, 2, 3])
    box.end(again, WORSE)
    control = box.next_trial()
    box.roll_back("m1")
    box.compare(control, 0.005)
    box.end(control, QUIET)
    assert box.states()[2] == "on trial"
    assert in_snapshot(box.next_trial()) == [1, 2]


def test_a_control_counts_as_a_trial_of_the_week_and_is_never_refused(box: Box) -> None:
    box.allow(1)
    blamed(box, 2)
    box.control(box.next_trial(), 0.5)
    box.allow(2)
    blamed(box, 1)
    assert (box.trial(), set(box.states().values())) == (None, {"accepted"}), "trial and control are two"


# --- how long a search may go on


def test_no_more_trials_begin_in_a_week_than_the_settings_allow_and_what_is_left_is_cleared(box: Box) -> None:
    box.allow(2)
    blamed(box, 4)
    for _ in range(2):
        trial = box.next_trial()
        box.end(trial, QUIET)
    assert box.trial() is None
    assert set(box.states().values()) == {"accepted"}
    assert len(box.events("suspicion_ended")) == 4, "no trial is left"
    box.now += 6 * DAY
    blamed(box, 1)
    assert box.trial() is None
    box.now += 2 * DAY
    blamed(box, 1)
    assert box.trial() is not None


# --- a person's word


@pytest.mark.parametrize("phase", ["before its trial", "trial", "control"])
@pytest.mark.parametrize(("word", "state"), [(drops.withdraw, "withdrawn"), (drops.restore, "accepted")])
def test_a_person_who_decides_on_a_suspect_ends_its_trial_or_control_and_the_search_goes_on_without_it(
    box: Box, phase: str, word: Callable[..., object], state: str
) -> None:
    blamed(box, 2)
    run = None if phase == "before its trial" else box.next_trial()
    if run is not None and phase == "control":
        box.end(run, WORSE)
        run = box.next_trial()
    word(box.engine, 3, Word("I looked at it", box.tick()), box.settings)
    if run is not None:
        assert box.row(run.id or 0).cancel_requested
        with pytest.raises(states.Cancelled):
            box.end(run, QUIET)
        run_owner.leave(box.engine, Claim(run.id or 0, run.token or ""), box.tick(), Then.CANCEL)
    assert box.states() == {1: "accepted", 2: "on trial", 3: state}
    if state == "accepted":
        again = box.claim()
        assert in_snapshot(again) == [1, 3]
        box.end(again, QUIET)
    assert in_snapshot(box.next_trial()) == [1, 2], "the drop that was blamed is not kept"
    assert box.settled == []


def test_a_suspect_is_tried_anew_without_another_drop_that_is_withdrawn_during_its_trial(box: Box) -> None:
    box.drop()
    box.end(box.claim(), WINS)
    blamed(box, 1)
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 2, 3]
    box.withdraw(1)
    box.cancel(trial)
    again = box.next_trial()
    assert (in_snapshot(again), box.states()[3]) == ([2, 3], "on trial")
    assert in_snapshot(box.control(again)) == [2], "which lacks the withdrawn drop as the trial does"
    assert box.states()[3] == "suspended"


def _accept_new_answers(box: Box, _pinned: int) -> None:
    box.propose(1)
    drops.accept_answers(box.engine, 1, Word("", box.tick()), box.settings)


@pytest.mark.parametrize("act", [_accept_new_answers, Box.withdraw])
def test_a_trial_is_made_again_if_what_judges_it_changes_before_its_control_ends(
    box: Box, act: Callable[[Box, int], object]
) -> None:
    blamed(box, 1)
    pinned = box.drop("heldout")
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 2, pinned]
    box.end(trial, WORSE)
    control = box.next_trial()
    act(box, pinned)
    assert box.row(control.id or 0).cancel_requested, "it would be judged by other answers or records than the trial"
    box.cancel(control)
    again = box.next_trial()
    assert (again.purpose, in_snapshot(again)[:2]) == ("trial", [1, 2])
    box.control(again)
    assert box.states()[2] == "suspended"


@pytest.mark.parametrize("word", ["accept", "withdraw", "restore"])
def test_a_drop_is_tried_anew_if_what_answers_its_questions_changes_though_its_trial_has_not_that_drop(
    box: Box, word: str
) -> None:
    box.drop()
    box.end(box.claim(), QUIET)
    drops.withdraw(box.engine, 2, Word("", box.tick()), box.settings)
    if word != "restore":
        drops.restore(box.engine, 2, Word("so that it is not tried", box.tick()), box.settings)
    blamed(box, 1)
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 3]
    box.propose(2)
    done = {"accept": drops.accept_answers, "withdraw": drops.withdraw, "restore": drops.restore}[word]
    done(box.engine, 2, Word("", box.tick()), box.settings)
    assert box.row(trial.id or 0).cancel_requested
    box.cancel(trial)
    assert in_snapshot(box.next_trial()) == [1, 3]


@pytest.mark.parametrize("later", [True, False])
def test_a_trial_goes_on_if_a_person_decides_on_a_drop_that_answers_none_of_its_questions(
    box: Box, *, later: bool
) -> None:
    blamed(box, 1 if later else 2)
    trial = box.next_trial()
    if later:
        box.withdraw(box.drop())
    else:
        drops.restore(box.engine, 2, Word("it is on trial, and counted before", box.tick()), box.settings)
    assert not box.row(trial.id or 0).cancel_requested


def test_a_drop_whose_trial_won_and_waits_is_in_a_run_again_where_that_trial_is_cancelled(box: Box) -> None:
    box.drop()
    box.end(box.claim(), WINS)
    blamed(box, 2)
    trial = box.next_trial()
    assert in_snapshot(trial) == [1, 2, 4]

    def still(session: Session, held: Run) -> None:
        suspects.follow_verdict(session, box.settings, held, WINS, box.now, serve=box.settle)

    claim = Claim(trial.id or 0, trial.token or "")
    run_owner.finish(box.engine, claim, run_owner.ending(AWAITING), box.tick(), still)
    assert box.states() == {1: "accepted", 2: "accepted", 3: "on trial", 4: "accepted"}
    done = box.withdraw(1)
    assert done.cancelled == [trial.id]
    assert box.queued() == [done.queued]
    run = box.claim()
    assert (run.trigger, in_snapshot(run)) == ("drop", [2, 4]), "what was tried is in a run, what is on trial in none"
    box.end(run, QUIET)
    following = box.next_trial()
    assert in_snapshot(following) == [2, 3], "the search goes on"


def test_a_drop_that_a_person_restored_is_not_tried_again(box: Box) -> None:
    blamed(box, 1)
    trial = box.next_trial()
    # What a run is for and what a person restored stand in rows.
    box.forget()
    box.control(trial)
    drops.restore(box.engine, 2, Word("I looked at it", box.tick()), box.settings)
    box.forget()
    box.end(box.claim(), WORSE)
    assert (box.order(), box.trial()) == ([], None)
    blamed(box, 1)
    assert box.order() == [3], "only what nobody has looked at"
    assert in_snapshot(box.next_trial()) == [1, 3]


# --- a crash


def _opening(box: Box) -> Callable[[], object]:
    box.drop()
    box.drop()
    run = box.claim()
    return lambda: box.end(run, WORSE)


def _queueing(box: Box) -> Callable[[], object]:
    blamed(box, 2)
    return box.go_on


def _found(box: Box) -> Callable[[], object]:
    blamed(box, 3)
    box.end(box.next_trial(), WORSE)
    control = box.next_trial()
    box.compare(control, 0.005)
    return lambda: box.end(control, QUIET)


def _controlling(box: Box) -> Callable[[], object]:
    blamed(box, 2)
    box.end(box.next_trial(), WORSE)
    return box.go_on


def _withdrawing(box: Box) -> Callable[[], object]:
    blamed(box, 2)
    box.trial()
    return lambda: drops.withdraw(box.engine, 3, Word("wrong", box.now), box.settings)


def _dump(engine: Engine) -> list[str]:
    raw = engine.raw_connection()
    try:
        return list(raw.driver_connection.iterdump())  # type: ignore[union-attr]
    finally:
        raw.close()


@pytest.mark.parametrize("act", [_opening, _queueing, _controlling, _found, _withdrawing])
def test_a_daemon_that_dies_at_any_commit_has_done_all_or_nothing_and_goes_on_to_the_same_end(
    tmp_path: Path, act: Callable[[Box], Callable[[], object]]
) -> None:
    whole = []
    for at in itertools.count():
        box = Box(tmp_path / f"{at}.db")
        with patch("secrets.token_hex", return_value="s"), patch("uuid.uuid4") as made:
            made.return_value.hex = "t"
            box.drop()
            box.end(box.claim(), WINS)
            do = act(box)
        now, before, death = box.now, _dump(box.engine), Trouble("death", at)
        with death.around(), suppress(Death):
            do()
        if death.hit:
            assert _dump(box.engine) == before
            box.now = now
            do()
        whole.append(_dump(box.engine))
        box.engine.dispose()
        if not death.hit:
            break
    assert len(whole) > 1
    assert all(one == whole[0] for one in whole)
