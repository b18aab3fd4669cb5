"""Messages to a server that fails, hangs, comes back; a daemon that is killed, restarted, or has no room to write."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import select
from structlog.testing import capture_logs

from daemon.messages import delivery, outbox
from daemon.service import Service
from daemon.settings.load import load
from daemon.state.database import open_reader, transaction
from daemon.state.tables import Drop, Message, Run
from daemon.state.troubles import Troubles
from daemon.views.overview import Overview
from pipeline.errors import DropforgeError
from tests.daemon.messages.conftest import Address, fail_hook, with_messages
from tests.daemon.messages.conftest import messenger as start

HOUR = 3_600_000
ROOT = Path(__file__).parents[3]


def errors_of(sent: list[dict[str, Any]]) -> list[str]:
    """Return by which error each message was."""
    return [one["message"].splitlines()[0].removeprefix("hooks.after_promotion: ") for one in sent]


def turn(lived_in: Any, troubles: Troubles | None = None) -> None:
    """Let a daemon that was just started send what it can, an hour later than the last one."""
    lived_in.now += HOUR
    start(lived_in, troubles).turn(lived_in.now)


def test_a_trouble_with_slurm_that_lasts_is_told_once_a_day(lived_in: Any, address: Address) -> None:
    with_messages(lived_in, urls=[address.url])
    now = [0.0]
    troubles = Troubles(lambda: now[0])

    def look(minutes: int) -> list[str]:
        now[0] += 60.0 * minutes
        lived_in.now += 60_000 * minutes
        troubles.note("Slurm", DropforgeError("it has not answered since 14:05"), message=True)
        troubles.note("track a", DropforgeError("another trouble"))
        start(lived_in, troubles).turn(lived_in.now)
        return address.titles

    assert look(9) == []
    assert look(9) == []
    troubles.clear("Slurm")
    assert look(9) == [], "another one since"
    assert look(10) == ["[dropforge] TROUBLE: Slurm"]
    assert address.taken[0]["message"] == "it has not answered since 14:05\nmore: dropforge status"
    assert [len(look(60)) for _ in range(25)] == [1] * 23 + [2] * 2


def test_a_server_that_fails_hangs_and_comes_back_has_each_message_once_late_and_in_order(
    lived_in: Any, address: Address
) -> None:
    with_messages(lived_in, urls=[address.url])
    fail_hook(lived_in, "one", "two")
    troubles = Troubles()
    address.answer = 500
    turn(lived_in, troubles)
    whose = "address 1 of messages, json://127.0.0.1"
    assert troubles.words == {whose: "2 messages cannot be sent: the answer was 500; to try: dropforge messages --test"}
    address.answer = None
    fail_hook(lived_in, "three")
    turn(lived_in, troubles)
    assert "3 messages cannot be sent: it was not reached, or refused the login or the message" in troubles.words[whose]
    assert (errors_of(address.refused), address.taken) == (["one", "one"], [])
    address.answer = 200
    address.release.set()
    turn(lived_in, troubles)
    assert errors_of(address.taken) == ["one", "two", "three"]
    assert troubles.words == {}
    assert (address.taken[0]["title"], address.taken[0]["type"]) == ("[dropforge] HOOK FAILED: default", "failure")
    assert address.taken[0]["message"].splitlines()[-1] == "to run it again: dropforge hook --track default"
    turn(lived_in, troubles)
    assert errors_of(address.taken) == ["one", "two", "three"]


def test_an_address_that_hangs_holds_up_no_other(lived_in: Any, new_address: Callable[[], Address]) -> None:
    hanging, well = new_address(), new_address()
    hanging.answer = None
    with_messages(lived_in, urls=[hanging.url, well.url])
    fail_hook(lived_in, "one", "two")
    turn(lived_in)
    assert (errors_of(hanging.refused), errors_of(well.taken)) == (["one"], ["one", "two"])


def test_a_call_that_never_ends_is_left_after_its_time(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "SECONDS", 0.2)
    address.answer = None
    error = delivery.send(address.url.replace("rto=0.5", "rto=600"), "title", "body", "info")
    assert error == "nothing was answered within 0 s"
    address.arrived.wait()


def test_what_a_library_raises_names_no_address(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_send", Mock(__name__="send", side_effect=ValueError(address.url)))
    assert delivery.send(address.url, "title", "body", "info") == "it ended with ValueError"


KILLED = """
import os, signal, sys
from pathlib import Path
from daemon.messages import delivery, outbox
from daemon.messages.outbox import Messenger
from daemon.settings.load import load
from daemon.state.database import open_engine
from daemon.state.troubles import Troubles
settings = load(Path(sys.argv[1]), {})
engine = open_engine(settings.state_folder / "dropforge.db")
module, name = {"after": (outbox, "record_sent"), "before": (delivery, "send")}[sys.argv[2]]
setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
Messenger(engine, settings, Troubles()).turn(int(sys.argv[3]))
"""


@pytest.mark.parametrize(("point", "copies"), [("after", 2), ("before", 1)])
def test_a_daemon_killed_between_sending_and_noting_sends_one_message_twice_at_most(
    lived_in: Any, address: Address, point: str, copies: int
) -> None:
    path = lived_in.folder / "dropforge.toml"
    path.write_text(f'{path.read_text()}[messages]\nurls = ["{address.url}"]\ndigest = ""\n')
    lived_in.settings = load(path, {})
    start(lived_in)
    fail_hook(lived_in, "one", "two")
    command = [sys.executable, "-c", KILLED, str(path), point, str(lived_in.now)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    for _ in range(3):
        turn(lived_in)
    assert errors_of(address.taken) == ["one"] * copies + ["two"]


def test_what_was_sent_and_could_not_be_noted_is_not_sent_again(
    lived_in: Any, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_messages(lived_in, urls=[address.url])
    fail_hook(lived_in, "one", "two")
    sending = start(lived_in)
    with monkeypatch.context() as full:
        error = OperationalError("", {}, Exception("database or disk is full"))
        full.setattr(outbox, "record_sent", Mock(side_effect=error))
        for hours in range(1, 4):
            with pytest.raises(OperationalError):
                sending.turn(lived_in.now + hours * HOUR)
    assert errors_of(address.taken) == ["one"]
    sending.turn(lived_in.now + 4 * HOUR)
    assert errors_of(address.taken) == ["one", "two"]


def test_a_server_that_hangs_keeps_no_file_from_being_taken_and_no_run_from_being_looked_at(
    tmp_path: Path, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "SECONDS", 600.0)
    monkeypatch.setattr(outbox, "_TICK_SECONDS", 0.01)
    address.answer = None
    path = tmp_path / "dropforge.toml"
    url = address.url.replace("rto=0.5", "rto=600")
    quick = 'worker = "separate"\nreconcile_seconds = 0.05\nrun_after_quiet_seconds = 0\n[intake]\nsettle_seconds = 0\n'
    path.write_text(f'{quick}[messages]\nurls = ["{url}"]\n')
    settings = load(path, {})
    daemon = Service(settings)
    working = threading.Thread(target=daemon.run)
    working.start()
    overview, pause = Overview.of(settings), threading.Event()

    def wait_until(condition: Callable[[], object]) -> None:
        while not condition():
            assert working.is_alive()
            pause.wait(0.05)

    try:
        wait_until((settings.inbox_folder / "done").is_dir)
        (settings.inbox_folder / "bad.jsonl").write_text('{"instruction": "x"}\n')
        wait_until(address.arrived.is_set)
        for number in range(3):
            (settings.inbox_folder / f"good{number}.jsonl").write_text(
                f'{{"instruction": "{number}", "output": "b"}}\n'
            )
        wait_until(lambda: overview.drop_counts() == {"default": {"rejected": 1, "accepted": 3}})
        # The main loop asks whether the run can begin, and writes down that there is no base model.
        wait_until(lambda: [run.error is not None for run in overview.runs()] == [True])
        assert len(address.refused) == 1, "all of it while the one message is being sent"
    finally:
        address.answer = 200
        address.release.set()
        daemon.stop.set()
        daemon._wake.set()
        working.join()
    assert rows(settings.state_folder / "dropforge.db", Drop) == 4
    assert rows(settings.state_folder / "dropforge.db", Run) == 1


def rows(path: Path, table: type[Any]) -> int:
    with open_reader(path).connect() as connection:
        return len(connection.execute(select(table)).all())


# --- what is never shown


def test_no_secret_of_an_address_is_in_database_log_or_trouble(lived_in: Any, address: Address) -> None:
    with_messages(lived_in, urls=[address.url, "nonsense://xoxb-secret-token", "json://u:hunter2@127.0.0.1:1/"])
    fail_hook(lived_in, "one")
    troubles = Troubles()
    with capture_logs() as logs:
        turn(lived_in, troubles)
    with transaction(lived_in.engine) as session:
        written = [message.model_dump() for message in session.exec(select(Message)).all()]
    seen = f"{logs} {troubles.words} {written} {lived_in.settings!r}"
    assert "nonsense://…" in seen
    assert "Apprise cannot read the address" in seen
    assert not [secret for secret in ("hunter2", "secret-token", "xoxb") if secret in seen]
