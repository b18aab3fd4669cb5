"""A drop's new answers to old questions: said everywhere, accepted by one command, and a run that uses them."""

import re
import time
from collections.abc import Callable

import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from daemon.inbox.answers.verdict_notes import _past_of, tell
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled
from daemon.messages.texts import text_of
from daemon.queue import drops
from daemon.state.database import transaction
from daemon.state.tables import Drop, Event, Run, Suspect
from daemon.system.processes import FileLock
from daemon.views.overview import DaemonView, Overview
from pipeline import durable
from pipeline.artifacts import AnswerPair, Replacement
from tests.daemon.conftest import Ended, LivedIn, lines
from tests.made_artifacts import dataset_of

WORDS = "150 records bring new answers to old questions"
ACCEPT = "dropforge drops accept 6 --answers"


def propose(lived_in: LivedIn, rows: int = 150) -> None:
    """Let run 3 find new answers in drop 6."""
    found = (Replacement(old=2, new=6, rows=rows),) if rows else ()
    pair = AnswerPair(old_drop=2, old_prompt="say a", old_answer="a", new_drop=6, new_answer="b <b>\x1b[2J")
    data = dataset_of(120, proposals=found, proposed_answers=(pair,) * 3)
    durable.write_json(lived_in.settings.work_folder / "runs/3/prepare.json", data.model_dump(mode="json"))
    with transaction(lived_in.engine) as session:
        run = session.get_one(Run, 3)
    drops.note_new_answers(lived_in.engine, run, found, lived_in.tick())


def note(lived_in: LivedIn) -> str:
    with transaction(lived_in.engine) as session:
        return tell(session, lived_in.settings, session.get_one(Drop, 6), _past_of(session, "default"))


def test_they_are_said_with_the_command_that_accepts_them(
    lived_in: LivedIn, dropforge: Callable[..., Ended], person: TestClient
) -> None:
    assert "new answers" not in note(lived_in) + dropforge("status").out
    propose(lived_in)
    for command in (("status",), ("drops",), ("attention",)):
        said = " ".join(dropforge(*command).out.split())
        assert WORDS in said, command
        assert ACCEPT in said, command
    words = note(lived_in)
    assert f"{WORDS}. They are not used, the old ones are." in words
    assert f"{ACCEPT}." in words
    assert words.count("    drop 2: a\n    new: b <b>") == 3
    assert "\x1b" not in words
    with transaction(lived_in.engine) as session:
        session.get_one(Drop, 6).first_run = None
    assert note(lived_in).count("    drop 2: a\n") == 3, "though it waits for a run again"
    with transaction(lived_in.engine) as session:
        events = session.exec(select(Event).where(Event.kind == "answers_proposed")).all()
        message = text_of(session, events[0])
    assert message is not None
    assert WORDS in message.body
    assert ACCEPT in message.body
    shown = person.get("/drops/6").text
    assert WORDS in shown
    assert "b &lt;b&gt;" in shown
    propose(lived_in, 140)
    with transaction(lived_in.engine) as session:
        assert len(session.exec(select(Event).where(Event.kind == "answers_proposed")).all()) == 1, "once is enough"
        counted = session.exec(select(Event.detail).where(Event.kind == "answers_counted", Event.drop_id == 6)).all()
    assert counted == [{"rows": 140}], "the note beside the file is written anew"
    propose(lived_in, 140)
    propose(lived_in, 0)
    assert "new answers" not in note(lived_in) + dropforge("status").out + dropforge("attention").out
    with transaction(lived_in.engine) as session:
        assert len(session.exec(select(Event).where(Event.kind == "answers_counted")).all()) == 2


def test_accepted_they_are_new_and_a_run_is_queued(lived_in: LivedIn, dropforge: Callable[..., Ended]) -> None:
    propose(lived_in)
    done = dropforge("drops", "accept", "6", "--answers", "--reason", "the prices changed")
    assert done.code == 0
    assert "its new answers to old questions count from the next run on" in done.out
    assert "run 4 is queued" in done.out
    with transaction(lived_in.engine) as session:
        drop, run = session.get_one(Drop, 6), session.get_one(Run, 4)
        assert (drop.answers_accepted, drop.first_run, run.state) == (True, None, "queued")
        event = session.exec(select(Event).where(Event.kind == "answers_accepted")).one()
        assert event.detail["reason"] == "the prices changed"
    for command in (("status",), ("drops",), ("attention",)):
        assert "new answers" not in dropforge(*command).out
    assert dropforge("drops", "accept", "6", "--answers").code == 0
    with transaction(lived_in.engine) as session:
        assert session.get(Run, 5) is None, "there is nothing more to train on"
    dropforge("drops", "withdraw", "6", "--reason", "oh")
    restored = dropforge("drops", "restore", "6", "--reason", "oh").out
    assert "its answers to old questions count again, as they were accepted" in restored


def test_the_pages_button_accepts_them(lived_in: LivedIn, person: TestClient) -> None:
    propose(lived_in)
    (path,) = re.findall(r'action="([^"]+)">\s*<button[^>]*>Accept the new answers<', person.get("/drops/6").text)
    done = person.post(path)
    assert (done.status_code, "its new answers to old questions count" in done.text) == (200, True)
    with transaction(lived_in.engine) as session:
        assert session.get_one(Drop, 6).answers_accepted


def test_whoever_takes_the_older_drop_out_is_told_that_they_may_count_unaccepted(
    lived_in: LivedIn, dropforge: Callable[..., Ended]
) -> None:
    propose(lived_in)
    withdraw, restore = (("drops", word, "2", "--reason", "x") for word in ("withdraw", "restore"))
    said = "150 records of drop 6 with other answers to its questions may count now, unaccepted"
    assert f"{said}; if they are wrong: dropforge drops withdraw 6 --reason TEXT\n" in dropforge(*withdraw).out
    assert dropforge(*restore).code == 0
    assert "may count now" in dropforge(*withdraw).out
    assert dropforge(*restore).code == 0
    assert dropforge("drops", "withdraw", "6", "--reason", "wrong").code == 0
    assert "may count now" not in dropforge(*withdraw).out


@pytest.mark.usefixtures("lived_in")
def test_only_an_accepted_drop_has_answers_to_accept(dropforge: Callable[..., Ended]) -> None:
    refused = dropforge("drops", "accept", "4", "--answers")
    assert (refused.code, "drop 4 is rejected" in refused.err) == (1, True)
    assert dropforge("drops", "accept", "6").code == 1, "it is no proposed drop"
    refused = dropforge("drops", "accept", "2", "--answers")
    assert (refused.code, "drop 2 brings no new answer" in refused.err) == (1, True)


def test_of_a_drop_on_trial_none_are_asked_for(
    lived_in: LivedIn, dropforge: Callable[..., Ended], person: TestClient
) -> None:
    propose(lived_in)
    with transaction(lived_in.engine) as session:
        session.add(Suspect(track="default", drop_id=6, blamed_run=2))
    refused = dropforge("drops", "accept", "6", "--answers")
    assert (refused.code, "drop 6 is on trial" in refused.err) == (1, True)
    shown = note(lived_in) + person.get("/drops/6").text + "".join(dropforge(name).out for name in ("status", "drops"))
    assert "new answers" not in shown + dropforge("attention").out


def test_what_is_accepted_while_a_run_prepares_is_asked_for_no_more(
    lived_in: LivedIn, dropforge: Callable[..., Ended]
) -> None:
    assert "run 4 is queued" in dropforge("drops", "accept", "6", "--answers").out
    propose(lived_in)
    with transaction(lived_in.engine) as session:
        assert session.exec(select(Event).where(Event.kind == "answers_proposed")).all() == []


def test_a_file_is_submitted_with_its_new_answers(
    lived_in: LivedIn, dropforge: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lived_in.folder / "new.jsonl").write_text(lines("a", "z"))
    inbox = lived_in.settings.inbox_folder / "new.jsonl"
    refused = dropforge("submit", "new.jsonl", "--new-answers")
    assert (refused.code, "is not running" in refused.out) == (69, True)

    def take(_seconds: float) -> None:
        Intake(lived_in.engine, lived_in.settings).take(Settled("default", "train", b"new.jsonl"), lived_in.tick())

    inbox.unlink()
    monkeypatch.setattr(Overview, "daemon", lambda _self: DaemonView(alive=True, pid=1))
    monkeypatch.setattr(time, "sleep", take)
    done = dropforge("submit", "new.jsonl", "--new-answers")
    assert "its new answers to old questions count from the next run on" in done.out
    with transaction(lived_in.engine) as session:
        assert session.exec(select(Drop.answers_accepted).where(Drop.name == "new.jsonl")).one()


def test_a_file_that_leaves_untaken_accepts_nothing_of_an_older_drop_of_its_name(
    lived_in: LivedIn, dropforge: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lived_in.folder / "new.jsonl").write_text(lines("a", "z"))
    inbox = lived_in.settings.inbox_folder / "new.jsonl"
    inbox.write_text(lines("a", "y"))
    Intake(lived_in.engine, lived_in.settings).take(Settled("default", "train", b"new.jsonl"), lived_in.tick())
    monkeypatch.setattr(Overview, "daemon", lambda _self: DaemonView(alive=True, pid=1))
    monkeypatch.setattr(time, "sleep", lambda _seconds: inbox.unlink())
    refused = dropforge("submit", "new.jsonl", "--new-answers")
    assert (refused.code, "is gone, and the daemon has not taken it" in refused.err) == (1, True)
    with transaction(lived_in.engine) as session:
        assert not session.exec(select(Drop.answers_accepted).where(Drop.name == "new.jsonl")).one()


def test_they_are_accepted_though_the_daemon_is_restarted_before_it_takes_the_file(
    lived_in: LivedIn, dropforge: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lived_in.folder / "new.jsonl").write_text(lines("a", "z"))
    lock = FileLock(lived_in.settings.state_folder / "daemon.lock")
    assert lock.acquire()
    intake, file = Intake(lived_in.engine, lived_in.settings), Settled("default", "train", b"new.jsonl")
    events = iter((lock.release, lock.acquire, lambda: intake.take(file, lived_in.tick())))
    monkeypatch.setattr(time, "sleep", lambda _seconds: next(events)())
    done = dropforge("submit", "new.jsonl", "--new-answers")
    lock.release()
    assert done.code == 0, done.err
    with transaction(lived_in.engine) as session:
        assert session.exec(select(Drop.answers_accepted).where(Drop.name == "new.jsonl")).one()


def test_the_settings_may_accept_them_at_once(lived_in: LivedIn) -> None:
    intake = lived_in.settings.intake.model_copy(update={"new_answers": "accept"})
    lived_in.settings = lived_in.settings.model_copy(update={"intake": intake})
    lived_in.take("new.jsonl", lines("a", "z"))
    with transaction(lived_in.engine) as session:
        assert session.exec(select(Drop.answers_accepted).where(Drop.name == "new.jsonl")).one()
