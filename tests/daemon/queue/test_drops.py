"""A person takes a drop out of later runs and puts it back; its file and its history stay."""

import re
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlmodel import col, select

from daemon.queue import drops
from daemon.settings.model import Settings
from daemon.state import database
from daemon.state.events import Word
from daemon.state.states import DropState
from daemon.state.tables import Drop, Event, Run
from pipeline.errors import DropforgeError
from tests.run_owner import add_drop
from tests.state_listing import STATE

NOW = 1_800_000_000_000
SETTINGS = Settings(run_after_quiet_seconds=10)


def add(engine: Engine, state: DropState, role: str = "train", sha256: str = "0" * 64, run: bool = False) -> int:  # noqa: FBT002
    with database.transaction(engine) as session:
        first = None
        if run:
            row = Run(track="default", trigger="drop", state="succeeded", created_at=NOW, not_before=NOW, ended_at=NOW)
            session.add(row)
            session.flush()
            first = row.id
        return add_drop(session, role=role, state=state, sha256=sha256, first_run=first)


def runs(engine: Engine) -> list[Run]:
    with database.transaction(engine) as session:
        return list(session.exec(select(Run).where(Run.state == "queued")).all())


def events(engine: Engine) -> list[tuple[str, int | None, object]]:
    with database.transaction(engine) as session:
        found = session.exec(select(Event).where(col(Event.kind).startswith("drop_"))).all()
        return [(event.kind, event.drop_id, event.detail.get("reason")) for event in found]


def test_a_proposed_drop_is_accepted_by_a_persons_word_and_starts_no_run(engine: Engine) -> None:
    number = add(engine, DropState.PROPOSED, "heldout")
    with pytest.raises(DropforgeError, match="is proposed, not withdrawn, suspended or on trial"):
        drops.restore(engine, number, Word("x", NOW), SETTINGS)
    drop = drops.accept(engine, number, Word("I looked at it", NOW, "ada"), SETTINGS)
    assert (drop.state, drop.reason) == ("accepted", None)
    assert events(engine) == [("drop_accepted", number, "I looked at it")]
    with database.transaction(engine) as session:
        assert session.exec(select(Event.detail)).one() == {"reason": "I looked at it", "by": "ada"}
    assert runs(engine) == []


@pytest.mark.parametrize(("trigger", "role"), [("nightly", "train"), ("drop", "heldout")])
def test_a_restored_drop_starts_no_run_where_a_new_one_would_not(engine: Engine, trigger: str, role: str) -> None:
    number = add(engine, DropState.WITHDRAWN, role)
    drops.restore(engine, number, Word("x", NOW), Settings.model_validate({"trigger": trigger}))
    assert runs(engine) == []


def test_a_drop_whose_content_is_accepted_again_is_not_restored_beside_it(engine: Engine) -> None:
    old = add(engine, DropState.WITHDRAWN)
    new = add(engine, DropState.ACCEPTED)
    with pytest.raises(DropforgeError, match=f"accepted already, as drop {new}"):
        drops.restore(engine, old, Word("x", NOW), SETTINGS)
    assert add(engine, DropState.ACCEPTED, "heldout") != new


def queue(engine: Engine, trigger: str = "drop") -> None:
    with database.transaction(engine) as session:
        session.add(Run(track="default", trigger=trigger, created_at=NOW, not_before=NOW))


@pytest.mark.parametrize("trigger", ["drop", "nightly"])
def test_a_run_whose_only_new_drop_is_withdrawn_is_cancelled_with_it(engine: Engine, trigger: str) -> None:
    old, new = add(engine, DropState.ACCEPTED, run=True), add(engine, DropState.ACCEPTED, sha256="1" * 64)
    queue(engine, trigger)
    done = drops.withdraw(engine, new, Word("wrong customer", NOW), SETTINGS)
    assert (runs(engine), done.cancelled, done.queued) == ([], [2], None)
    assert done.words[1] == "run 2 is cancelled with it"
    with database.transaction(engine) as session:
        run = session.get_one(Run, 2)
        assert (run.state, run.error) == (
            "cancelled",
            f"drop {new} ({new}.jsonl) was withdrawn, and no other drop is new",
        )
        assert session.get_one(Drop, old).state == "accepted"


def test_a_queued_run_stays_for_another_new_drop_or_a_persons_wish(engine: Engine) -> None:
    first, second = add(engine, DropState.ACCEPTED), add(engine, DropState.ACCEPTED, sha256="1" * 64)
    queue(engine)
    assert drops.withdraw(engine, first, Word("x", NOW), SETTINGS).cancelled == []
    assert drops.withdraw(engine, second, Word("x", NOW), SETTINGS).cancelled == [1]
    queue(engine, "hand")
    third = add(engine, DropState.ACCEPTED, sha256="2" * 64)
    assert drops.withdraw(engine, third, Word("x", NOW), SETTINGS).cancelled == []


def test_a_run_that_pinned_records_started_stays(engine: Engine) -> None:
    settings = Settings.model_validate({"gate": {"on": "pinned"}})
    old = add(engine, DropState.ACCEPTED, run=True)
    with database.transaction(engine) as session:
        session.get_one(Run, 1).outcome = "insufficient_evidence"
    add(engine, DropState.ACCEPTED, "heldout")
    queue(engine)
    assert drops.withdraw(engine, old, Word("x", NOW), settings).cancelled == []


def test_the_chart_of_a_drops_states_is_what_intake_and_people_do(engine: Engine, lived_in: Any) -> None:
    drawn = set(re.findall(r"^  (\S+) --> (\w+): ", STATE, re.MULTILINE))
    (lived_in.settings.inbox_folder / "heldout" / "theirs.jsonl").touch()
    (lived_in.settings.inbox_folder / "heldout" / "theirs.jsonl").chmod(0o666)
    lived_in.take("theirs.jsonl", '{"instruction": "say x", "output": "x"}\n', "heldout")
    with database.transaction(lived_in.engine) as session:
        done = {("[*]", str(drop.state)) for drop in session.exec(select(Drop))}
    for place, state in enumerate(DropState):
        for act in (drops.accept, drops.withdraw, drops.restore):
            number = add(engine, state, sha256=f"{place}{len(done)}" * 32)
            with suppress(DropforgeError):
                act(engine, number, Word("x", NOW), SETTINGS)
            with database.transaction(engine) as session:
                done.add((str(state), str(session.get_one(Drop, number).state)))
    # Only a control suspends a drop: test_suspects.py.
    assert drawn == {(was, now) for was, now in done if was != now} | {("accepted", "suspended")}
