from collections.abc import Callable

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from daemon.queue import run_queue, snapshots, states
from daemon.queue import states as run_states
from daemon.queue.attempt_ends import POSTPONED_MS, Leave, Then
from daemon.queue.states import Claim, LostClaim
from daemon.settings.model import RetrySettings, Settings
from daemon.state.database import transaction
from daemon.state.states import AttemptState, DropState, RunState
from daemon.state.tables import Drop, Event, Run, Track
from pipeline.config import RunConfig, TrainConfig
from pipeline.errors import DropforgeError
from tests import run_owner
from tests.run_owner import add_drop, configure

RETRY = RetrySettings(limit=3, backoff_seconds=30.0)
BROKEN = Leave(Then.RETRY, DropforgeError("no memory left", "lower train.batch_size"))
HOUR_MS = 3_600_000


def refuse(_session: Session, _track: Track) -> RunConfig:
    message, hint = "the base model is gone", "set base_model"
    raise DropforgeError(message, hint)


def queue_run(engine: Engine, track: str = "default", now: int = 0, not_before: int = 0) -> int:
    """Drop a file and queue its run."""
    with transaction(engine) as session:
        states.ensure_track(session, track, now)
        add_drop(session, track)
        return run_queue.enqueue(session, track, "drop", now, not_before).id or 0


def take(engine: Engine, now: int = 100) -> Claim:
    claim = run_owner.claim(engine, now, configure)
    assert claim is not None
    return claim


def start_run(engine: Engine) -> Claim:
    queue_run(engine)
    return take(engine)


def load(engine: Engine, run_id: int) -> Run:
    with transaction(engine) as session:
        return session.get_one(Run, run_id)


def events(engine: Engine, run_id: int | None = None) -> list[str]:
    with transaction(engine) as session:
        rows = session.exec(select(Event).order_by(Event.id)).all()  # type: ignore[arg-type]
    return [row.kind for row in rows if run_id is None or row.run_id == run_id]


# --- enqueue


def test_drops_of_one_track_share_its_one_queued_run_and_put_it_off(engine: Engine) -> None:
    first = queue_run(engine, now=1_000, not_before=61_000)
    assert queue_run(engine, now=2_000, not_before=62_000) == first
    assert queue_run(engine, now=3_000, not_before=3_000) == first
    assert load(engine, first).not_before == 62_000
    assert events(engine, first) == ["run_queued"]


def test_drops_that_keep_coming_do_not_put_a_run_off_for_ever(engine: Engine) -> None:
    settings = Settings(run_after_quiet_seconds=60)
    due = []
    for now in range(0, 2 * HOUR_MS, 30_000):
        with transaction(engine) as session:
            run = run_queue.enqueue_when_quiet(session, settings, "default", now)
            assert run is not None
            due.append(run.not_before)
    assert due[:3] == [60_000, 90_000, 120_000]
    assert max(due) == due[-1] == HOUR_MS


def test_a_run_queued_after_the_clock_was_read_waits_and_one_by_a_clock_set_back_does_not(engine: Engine) -> None:
    queue_run(engine, now=1_000, not_before=61_000)
    assert run_owner.claim(engine, 900, configure) is None
    queue_run(engine, "support", now=HOUR_MS, not_before=HOUR_MS)
    claim = run_owner.claim(engine, 900, configure)
    assert claim is not None
    assert load(engine, claim.run_id).track == "support"


# --- changes of a state


@pytest.mark.parametrize(
    ("state", "change"),
    [(RunState.RUNNING, "token = 'other'"), (RunState.QUEUED, "state = 'cancelled', ended_at = 150")],
)
def test_a_run_that_is_not_as_it_was_read_is_not_changed(engine: Engine, state: RunState, change: str) -> None:
    run_id = start_run(engine).run_id if state == RunState.RUNNING else queue_run(engine)
    with transaction(engine) as session:
        run = session.get_one(Run, run_id)
        session.connection().exec_driver_sql(f"UPDATE run SET {change}")
        with pytest.raises(LostClaim, match="by somebody else"):
            run_states.change(session, run, run_states.Move(RunState.CANCELLED, "run_cancelled"), 200)
    assert "run_cancelled" not in events(engine, run_id)


def test_a_changed_run_reads_as_it_is_in_the_database_and_can_be_changed_again(engine: Engine) -> None:
    claim = start_run(engine)
    with transaction(engine) as session:
        run = session.get_one(Run, claim.run_id)
        run_states.change(session, run, run_states.Move(RunState.FAILED, "run_failed", {"error": "no"}), 200)
        seen = run.model_dump()
        session.refresh(run)
        assert run.model_dump() == seen
        assert (run.state, run.ended_at, run.token, run.error) == ("failed", 200, None, "no")
        run_states.change(session, run, run_states.Move(RunState.WAITING, "run_retried"), 300)
    assert events(engine, claim.run_id)[-2:] == ["run_failed", "run_retried"]


# --- claim


def test_a_claimed_run_has_a_snapshot_of_the_accepted_drops_of_its_track(engine: Engine) -> None:
    with transaction(engine) as session:
        for state in DropState:
            add_drop(session, state=state)
        add_drop(session, role="heldout")
        add_drop(session, track="other")
        run_queue.enqueue(session, "default", "drop", 5, 5)
    claim = take(engine)
    run = load(engine, claim.run_id)
    assert (run.state, run.token, run.started_at) == (RunState.RUNNING, claim.token, 100)
    assert run.snapshot == [1, 7]
    assert RunConfig.model_validate(run.config).track == "default"
    with transaction(engine) as session:
        assert [row.first_run for row in session.exec(select(Drop))] == [1, None, None, None, None, None, 1, None]


def test_a_waiting_run_goes_before_an_older_queued_one_and_keeps_its_snapshot(engine: Engine) -> None:
    older, newer = queue_run(engine, "a", not_before=500), queue_run(engine, "b")
    claim = take(engine, 100)
    assert claim.run_id == newer
    run_owner.leave(engine, claim, 600, Then.INTERRUPT)
    snapshot = load(engine, newer).snapshot
    queue_run(engine, "b")
    assert take(engine, 600).run_id == newer
    assert older < newer
    assert load(engine, newer).snapshot == snapshot


def test_a_run_that_cannot_be_configured_stays_queued_says_why_once_and_lets_others_pass(engine: Engine) -> None:
    blocked, other = queue_run(engine, "a"), queue_run(engine, "b")

    def only_b(session: Session, track: Track) -> RunConfig:
        return (refuse if track.name == "a" else configure)(session, track)

    claim = run_owner.claim(engine, 100, only_b)
    assert claim is not None
    assert claim.run_id == other
    run = load(engine, blocked)
    assert (run.state, run.error, run.hint) == (RunState.QUEUED, "the base model is gone", "set base_model")
    assert run.not_before == 30_100
    run_owner.finish(engine, claim, run_owner.ending("promoted"), 200)
    assert run_owner.claim(engine, 30_100, refuse) is None
    assert events(engine, blocked) == ["run_queued", "run_blocked"]
    assert take(engine, 60_100).run_id == blocked
    assert load(engine, blocked).error is None


def test_a_run_with_nothing_left_to_train_on_is_cancelled_with_its_reason(engine: Engine) -> None:
    with transaction(engine) as session:
        add_drop(session, role="heldout")
        add_drop(session, state=DropState.WITHDRAWN)
        run_id = run_queue.enqueue(session, "default", "drop", 0, 0).id or 0
    assert run_owner.claim(engine, 100, configure) is None
    run = load(engine, run_id)
    assert (run.state, run.error) == (RunState.CANCELLED, "no accepted drop of track default is left to train on")
    with transaction(engine) as session:
        assert {row.first_run for row in session.exec(select(Drop))} == {None}


# --- what an owner may do, and nobody else

OWNERS: dict[str, Callable[[Engine, Claim], object]] = {
    "finish": lambda engine, claim: run_owner.finish(engine, claim, run_owner.ending("promoted"), 300),
    "leave": lambda engine, claim: run_queue.leave(engine, claim, BROKEN, 300, RETRY),
    "begin_attempt": lambda engine, claim: states.begin_attempt(engine, claim, "train", 300),
    "end_attempt": lambda engine, claim: states.end_attempt(
        engine, claim, 1, states.Ending(AttemptState.PUBLISHED), 300
    ),
}


@pytest.mark.parametrize("name", OWNERS)
def test_an_owner_with_an_old_token_changes_nothing(engine: Engine, name: str) -> None:
    old = start_run(engine)
    states.begin_attempt(engine, old, "prepare", 110)
    (new,) = run_queue.rescue(engine, 200)
    before = (load(engine, old.run_id), events(engine))
    with pytest.raises(LostClaim, match="not held by this daemon"):
        OWNERS[name](engine, old)
    assert (load(engine, old.run_id), events(engine)) == before
    assert load(engine, old.run_id).token == new.token
    attempt = states.open_attempt(engine, old.run_id)
    assert attempt is not None
    assert attempt.step == "prepare"


# --- cancel, retry, rescue


def test_a_waiting_run_is_cancelled_at_once(engine: Engine) -> None:
    claim = start_run(engine)
    run_owner.leave(engine, claim, 200, Then.INTERRUPT)
    with transaction(engine) as session:
        run = session.get_one(Run, claim.run_id)
        run.error, run.hint = "its process vanished", "wait"
    assert run_queue.cancel(engine, claim.run_id, 300) == RunState.CANCELLED
    assert (load(engine, claim.run_id).error, load(engine, claim.run_id).hint) == (None, None)
    assert run_owner.claim(engine, 400, configure) is None


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("then", [then for then in Then if then is not Then.GO_ON])
def test_a_run_that_would_wait_or_end_is_cancelled_if_that_was_requested(
    engine: Engine, then: Then, limit: int
) -> None:
    claim = start_run(engine)
    with transaction(engine) as session:
        run_queue.call_off(session, session.get_one(Run, claim.run_id), 200, "drop 1 was withdrawn")
    assert run_owner.leave(engine, claim, 300, then, error="no memory left", limit=limit) == RunState.CANCELLED
    run = load(engine, claim.run_id)
    assert (run.ended_at, run.error) == (300, "drop 1 was withdrawn")


def test_a_cancelled_run_that_never_began_is_refused_if_a_later_one_has_its_drops(engine: Engine) -> None:
    run_id = queue_run(engine)
    run_queue.cancel(engine, run_id, 50)
    later = queue_run(engine)
    with pytest.raises(DropforgeError, match=f"run {later} of track default will include its drops") as refused:
        run_owner.retry(engine, run_id, 60)
    assert refused.value.hint.endswith(f"dropforge show {later}")
    assert load(engine, run_id).state == RunState.CANCELLED


# --- attempts


def test_attempts_are_numbered_by_step_with_a_fence_each_and_one_is_open_at_most(engine: Engine) -> None:
    claim = start_run(engine)
    prepare = states.begin_attempt(engine, claim, "prepare", 200)
    with pytest.raises(DropforgeError, match="attempt 1 at step prepare"):
        states.begin_attempt(engine, claim, "train", 210)
    states.end_attempt(engine, claim, prepare.id or 0, states.Ending(AttemptState.FAILED, "broken"), 220)
    assert states.open_attempt(engine, claim.run_id) is None
    first = states.begin_attempt(engine, claim, "train", 230)
    states.end_attempt(engine, claim, first.id or 0, states.Ending(AttemptState.LOST), 240)
    second = states.begin_attempt(engine, claim, "train", 250)
    with pytest.raises(LostClaim, match="has ended already"):
        states.end_attempt(engine, claim, first.id or 0, states.Ending(AttemptState.PUBLISHED), 260)
    assert states.open_attempt(engine, claim.run_id) == second, "its predecessor's end is not its own"
    run_owner.leave(engine, claim, 300, Then.INTERRUPT)
    assert states.open_attempt(engine, claim.run_id) is None, "its run has stopped"
    third = states.begin_attempt(engine, take(engine, 300), "train", 310)
    begun = [prepare, first, second, third]
    numbers = [("prepare", 1), ("train", 1), ("train", 2), ("train", 3)]
    assert [(attempt.step, attempt.number) for attempt in begun] == numbers
    assert len({attempt.fence for attempt in begun}) == 4
    ended = [kind for kind in events(engine, claim.run_id) if kind in {"step_failed", "step_lost"}]
    assert ended == ["step_failed", "step_lost", "step_lost"]


# --- what is fixed, what waits, what is held


def test_a_failed_run_gives_its_drops_back_and_a_retry_has_todays_settings_and_not_the_drops_taken_out_since(
    engine: Engine,
) -> None:
    def waiting() -> int:
        with transaction(engine) as session:
            return snapshots.waiting_drops(session, "default")

    def changed(session: Session, track: Track) -> RunConfig:
        return configure(session, track).model_copy(update={"train": TrainConfig(batch_size=2)})

    with transaction(engine) as session:
        add_drop(session)
    claim = start_run(engine)
    assert waiting() == 0
    run_owner.leave(engine, claim, 200, Then.FAIL)
    assert waiting() == 2
    with transaction(engine) as session:
        session.get_one(Drop, 1).state = DropState.WITHDRAWN
    queue_run(engine)
    run_owner.retry(engine, claim.run_id, 300)
    assert run_owner.claim(engine, 300, refuse) is None
    assert "the base model is gone" in (load(engine, claim.run_id).error or "")
    again = run_owner.claim(engine, 300 + POSTPONED_MS, changed)
    assert again is not None
    run = load(engine, again.run_id)
    assert (run.id, run.error) == (claim.run_id, None)
    assert (run.snapshot, waiting()) == ([2], 1)
    assert RunConfig.model_validate(run.config).train.batch_size == 2


# --- search


def configure_search(when: str) -> Callable[[Session, Track], RunConfig]:
    train = TrainConfig.model_validate({"search": {"when": when, "space": {"rank": [8, 16]}}})
    return lambda session, track: configure(session, track).model_copy(update={"train": train})


@pytest.mark.parametrize(
    ("when", "search", "searches"),
    [("always", False, True), ("asked", False, False), ("asked", True, True), ("always", True, True)],
)
def test_a_search_that_is_to_be_asked_for_is_left_out_of_other_runs(
    engine: Engine, when: str, search: bool, searches: bool
) -> None:
    queued = queue_run(engine, now=1_000, not_before=HOUR_MS)
    assert run_queue.enqueue_by_hand(engine, "default", 2_000, search=search)[0] == queued, (
        "the drop's run, which waited"
    )
    claim = run_owner.claim(engine, 3_000, configure_search(when))
    assert claim is not None
    config = RunConfig.model_validate(load(engine, claim.run_id).config)
    assert bool(config.train.search.space) is searches
