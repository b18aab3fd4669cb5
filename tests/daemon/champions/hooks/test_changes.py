"""The user's commands after a change of champion: real processes, real rows; nothing waits for the clock."""

import json
import os
import select as kernel
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlmodel import col, select

from daemon.champions import base_models, history, promotion
from daemon.champions.hooks.changes import Hooks
from daemon.champions.hooks.commands import KEPT_OUTPUT, Command, last_line
from daemon.state.database import transaction
from daemon.state.tables import Event, Promotion
from daemon.state.troubles import Troubles
from daemon.system.programs import who
from pipeline.errors import DropforgeError
from tests.chaos.house import START, build, records
from tests.daemon.champions import test_approval as approval
from tests.model_folder import write_model
from tests.settled_hooks import end_running, settle

WRITE = "import json, os, sys; open(sys.argv[1], 'a').write(json.dumps(dict(os.environ)) + '\\n')"


class House(approval.House):
    """A workspace whose settings name commands."""

    def __init__(self, folder: Path) -> None:
        # Its first daemon knows of the commands.
        self.folder, self.now, self.runs = folder, START, 0
        self.refused: str | None = None
        self.tried: list[Path] = []
        build(folder)

    def start(
        self, hook: list[str] | None = None, health: list[str] | None = None, seconds: float = 60, more: str = ""
    ) -> "House":
        self.restart(
            f"[hooks]\nafter_promotion = {json.dumps(hook or [])}\nhealth = {json.dumps(health or [])}\n"
            f"timeout_seconds = {seconds}\n{more}"
        )
        self.hooks = self.new_hooks()
        return self

    def new_hooks(self, **how: Any) -> Hooks:
        return Hooks(self.daemon.engine, self.daemon.settings, try_out=self._try_out, **how)

    def _try_out(self, folder: Path, **_: object) -> None:
        self.tried.append(folder)
        if self.refused:
            raise DropforgeError(self.refused)

    def settle(self) -> None:
        """Let the commands run until there is none to run any more."""
        settle(self.hooks, self.now)

    def rows(self) -> list[Promotion]:
        with transaction(self.daemon.engine) as session:
            return list(session.exec(select(Promotion).order_by(col(Promotion.generation))).all())

    def told(self) -> list[dict[str, str]]:
        """What the hooks found in their environment."""
        path = self.folder / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def tell(house: House, code: str = "") -> list[str]:
    return [sys.executable, "-c", f"{WRITE}\n{code}", str(house.folder / "told")]


def run(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def states(house: House) -> list[tuple[str | None, str | None]]:
    return [(row.hook_state, row.health_state) for row in house.rows()]


def test_a_hook_is_told_what_changed_and_the_first_champion_needs_none(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@of-the-daemon")
    monkeypatch.setenv("MINE", "kept")
    house.start(tell(house))
    house.settle()
    assert house.told() == []
    house.run()
    verdict = house.daemon.root / "runs/1/decide.json"
    verdict.write_text(json.dumps({**json.loads(verdict.read_text()), "report": "runs/1/attempts/decide-1/report"}))
    house.settle()
    (told,) = house.told()
    row = house.rows()[-1]
    root = house.daemon.root
    assert {name: value for name, value in told.items() if name.startswith("PROMOTION_")} == {
        "PROMOTION_TRACK": "default",
        "PROMOTION_KIND": "promotion",
        "PROMOTION_GENERATION": "1",
        "PROMOTION_MODEL_ID": row.model_id,
        "PROMOTION_MODEL_PATH": str(root / row.model_path),
        "PROMOTION_PREVIOUS_PATH": str(house.folder / "base"),
        "PROMOTION_RUN": "1",
        "PROMOTION_REPORT": str(root / "runs/1/attempts/decide-1/report"),
        "PROMOTION_ADAPTER": str(root / "runs" / "1" / "attempts" / "train-1"),
        "PROMOTION_SMOKE_PROMPTS": "",
    }
    assert (told["MINE"], "NOTIFY_SOCKET" in told) == ("kept", False)
    assert states(house) == [(None, None), ("ok", None)]
    assert house.events()[-2:] == ["hook_started", "hook_succeeded"]


def test_another_base_that_takes_the_place_of_a_base_has_its_hook_too(house: House) -> None:
    house.start(tell(house), tell(house))
    write_model(house.folder / "other", b"other weights")
    other = base_models.Base(house.folder / "other", "other-id")
    for now in range(2):
        base_models.ensure_base(house.daemon.engine, house.daemon.root, "default", other, now)
    house.settle()
    (told,) = house.told()
    assert (told["PROMOTION_KIND"], told["PROMOTION_MODEL_PATH"]) == ("base", str(house.folder / "other"))
    assert states(house) == [(None, None), ("ok", None)]


def test_a_damaged_verdict_keeps_no_command_from_running_and_a_healthy_model_stays(house: House) -> None:
    house.start(tell(house), tell(house))
    house.run()
    (house.daemon.root / "runs/1/decide.json").write_bytes(b"\xff")
    house.settle()
    assert states(house)[1:] == [("ok", "ok")]
    assert [(told["PROMOTION_RUN"], told["PROMOTION_REPORT"]) for told in house.told()] == [("1", "")] * 2


def test_a_script_that_cannot_be_started_is_said_to_have_a_wrong_first_line(tmp_path: Path) -> None:
    script = tmp_path / "reload.sh"
    script.write_text("#!/bin/sh\r\n")
    script.chmod(0o755)
    error = Command((str(script),), dict(os.environ), 5.0).wait().error or ""
    assert error.startswith(f"it could not be started: {script}: ")
    assert error.endswith("; if it is a script, look at its #! line")
    gone = Command((f"{script}.gone",), dict(os.environ), 5.0).wait().error
    assert gone == f"it could not be started: {script}.gone: No such file or directory"


def test_what_a_command_leaves_in_the_background_may_print_on(tmp_path: Path) -> None:
    go, lives = tmp_path / "go", tmp_path / "lives"
    for pipe in (go, lives):
        os.mkfifo(pipe)
    reading = os.open(lives, os.O_RDONLY | os.O_NONBLOCK)
    # More than a pipe holds, once the command is long over.
    left = f"(exec 3>{lives}; read -r _ <{go}; head -c 200000 /dev/zero; echo on; printf yes >&3) & echo begun"
    ended = Command(("sh", "-c", left), dict(os.environ), 60.0).wait()
    assert (ended.error, ended.output) == (None, "begun\n")
    go.write_text("now\n")
    os.set_blocking(reading, True)
    with open(reading, "rb") as said:  # noqa: PTH123 - a descriptor
        assert said.read() == b"yes", "it was neither ended nor held up by its output"


def test_a_hook_that_does_not_end_is_given_up(house: House) -> None:
    house.start(run("while True: pass"), seconds=1)
    house.run()
    house.settle()
    row = house.rows()[-1]
    assert (row.hook_state, row.hook_error) == ("failed", "no end within 1 s")


def test_a_hook_that_is_killed_takes_all_that_it_started_with_it(house: House) -> None:
    pipe = house.folder / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    inner = (
        f"import signal; f = open({str(pipe)!r}, 'w'); print('here', file=f, flush=True); signal.alarm(99); "
        "signal.pause()"
    )
    house.start(run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"))
    house.run()
    house.hooks.tick(house.now)
    assert kernel.select([reader], [], [], 60)[0]
    assert os.read(reader, 9) == b"here\n"
    house.hooks.stop()
    assert kernel.select([reader], [], [], 30)[0], "the pipe's other end is still held"
    assert os.read(reader, 9) == b""
    os.close(reader)


def test_the_end_of_much_output_is_kept(house: House) -> None:
    house.start(run("print('x' * 300_000); print('the end')"))
    house.run()
    house.settle()
    output = house.rows()[-1].hook_output or ""
    assert (len(output), output.endswith("x\nthe end\n")) == (KEPT_OUTPUT, True)


def test_a_hook_of_a_daemon_that_died_is_run_again(house: House) -> None:
    house.start(tell(house))
    house.run()
    house.hooks.tick(house.now)
    end_running(house.hooks)
    assert states(house)[-1][0] == "running", "it ended, and nobody was there to note it"
    house.hooks = house.new_hooks()
    house.settle()
    assert len(house.told()) == 2
    assert states(house)[-1] == ("ok", None)


# --- run again


def test_a_hook_that_failed_is_run_again_when_a_person_asks(house: House, dropforge: Callable[..., Any]) -> None:
    mend = house.folder / "mended"
    house.start(tell(house, f"import pathlib; raise SystemExit(0 if pathlib.Path({str(mend)!r}).exists() else 3)"))
    house.run()
    house.settle()
    assert states(house) == [(None, None), ("failed", None)]
    assert "failed: exit code 3; to run it again: dropforge hook --track default" in dropforge("status").out
    mend.touch()
    asked = dropforge("hook")
    assert (asked.code, asked.out) == (0, "hooks.after_promotion runs once the daemon does\n")
    again = dropforge("hook")
    assert (again.code, "is pending already" in again.err) == (1, True)
    # A daemon that starts later finds it on the row.
    house.hooks = house.new_hooks()
    house.settle()
    row = house.rows()[-1]
    assert (row.hook_state, row.hook_error) == ("ok", None)
    assert [told["PROMOTION_GENERATION"] for told in house.told()] == ["1", "1"]
    assert house.events()[-5:] == ["hook_started", "hook_failed", "hook_asked_again", "hook_started", "hook_succeeded"]
    with transaction(house.daemon.engine) as session:
        event = session.exec(select(Event).where(Event.kind == "hook_asked_again")).one()
    assert (event.detail or {})["by"] == who()
    assert "to run it again" not in dropforge("status").out


@pytest.mark.parametrize(
    ("end", "error"), [("raise SystemExit(5)", "exit code 5"), ("os.kill(os.getpid(), 9)", "killed by SIGKILL")]
)
def test_a_hook_that_fails_undoes_nothing_and_its_last_words_are_shown_and_logged(
    house: House, dropforge: Callable[..., Any], end: str, error: str
) -> None:
    said = r"print('so sorry\nreload failed: \x1b[31mno such unit ZZTOP\n \n', flush=True)"
    house.start(run(f"import os; {said}; {end}"))
    house.run()
    with structlog.testing.capture_logs() as logged:
        house.settle()
    words = r"reload failed: \x1b[31mno such unit ZZTOP"
    (failed,) = [one for one in logged if one["event"] == "hook_failed"]
    assert (failed["error"], failed["said"]) == (error, words)
    assert (house.rows()[-1].hook_state, house.serves[0]) == ("failed", 1)
    for command in ("status", "history"):
        shown = dropforge(command).out
        assert f"track default, generation 1: hooks.after_promotion failed: {error}" in shown
        assert f"hooks.after_promotion said: {words}\n" in shown
    assert dropforge("history", "--json").json["history"][0]["hook"]["output"].startswith("so sorry\n")
    assert last_line(None) == last_line(" \n") == ""
    assert last_line(f"a\n{'b' * 300}\n") == "b" * 199 + "…"
    assert last_line("error: it serves another model\nhint: see its log\n") == "error: it serves another model"


# --- health


def _note_next(house: House) -> None:
    """Let the command that runs end, and the daemon look once."""
    end_running(house.hooks)
    house.hooks.tick(house.now)


def test_a_hook_that_is_asked_for_during_the_health_check_of_an_unhealthy_model_tells_nobody_of_it(
    house: House, dropforge: Callable[..., Any]
) -> None:
    house.start(tell(house), run("raise SystemExit(7)"))
    house.run()
    house.hooks.tick(house.now)
    _note_next(house)
    assert states(house)[-1] == ("ok", "running")
    assert dropforge("hook").code == 0
    _note_next(house)
    assert (house.hooks._running, list(house.hooks._rollbacks)) == ({}, ["default"]), "the way back comes first"
    house.settle()
    assert states(house) == [(None, None), ("skipped", "failed"), ("ok", None)]
    said = [(told["PROMOTION_KIND"], told["PROMOTION_GENERATION"]) for told in house.told()]
    assert said == [("promotion", "1"), ("rollback", "2")]


def test_an_unhealthy_model_is_rolled_back_by_itself_and_blocked(house: House, dropforge: Callable[..., Any]) -> None:
    house.start(tell(house), run("raise SystemExit(7)"))
    house.run()
    house.settle()
    base, unhealthy, back = house.rows()
    assert (unhealthy.health_state, unhealthy.health_error) == ("failed", "exit code 7")
    assert (back.kind, back.model_id, back.generation, back.approved_by) == ("rollback", base.model_id, 2, None)
    assert "health command failed: exit code 7" in back.reason
    assert (back.hook_state, back.health_state) == ("ok", None), "the server is told, and nobody asks for its health"
    assert [told["PROMOTION_KIND"] for told in house.told()] == ["promotion", "rollback"]
    assert house.tried == [house.folder / "base"]
    assert {"health_failed", "rolled_back"} <= set(house.events())
    assert "health command failed" in dropforge("status").out
    with transaction(house.daemon.engine) as session:
        past = promotion.champions_of(session, "default")
    assert history.blocked(past) == {unhealthy.model_id}


def test_a_way_back_that_is_refused_is_said_and_not_tried_for_ever(house: House, dropforge: Callable[..., Any]) -> None:
    house.start(None, run("raise SystemExit(7)"))
    house.refused = "it says nothing"
    house.run()
    house.settle()
    assert len(house.tried) == 1
    row = house.rows()[-1]
    assert (row.health_state, row.health_error) == ("failed", "exit code 7; not rolled back: it says nothing")
    assert "rollback_failed" in house.events()
    assert "hooks.health failed: exit code 7; not rolled back: it says nothing" in dropforge("status").out


def test_a_way_back_that_meets_a_full_disk_is_tried_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.champions.hooks.changes._TROUBLE_SECONDS", 0)
    house.start(None, tell(house, "raise SystemExit(7)"))
    real, full = house._try_out, [OSError(28, "No space left on device")]

    def try_out(folder: Path, **how: object) -> None:
        if full:
            raise full.pop()
        real(folder, **how)

    monkeypatch.setattr(house.hooks, "_try_out", try_out)
    house.run()
    house.settle()
    assert [(row.kind, row.health_state) for row in house.rows()][1:] == [("promotion", "failed"), ("rollback", None)]
    assert len(house.told()) == 1, "its health is not asked for again"


def test_a_champion_that_comes_as_the_way_back_begins_is_left(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.start(None, run("raise SystemExit(7)"))
    house.run()
    seen, asked = Hooks._serves, iter([True])

    def serves(hooks: Hooks, row: Promotion) -> bool:
        found = seen(hooks, row)
        if row.health_error is not None and next(asked, False):
            house.daemon.settings.inbox_folder.joinpath("late.jsonl").write_bytes(records("late"))
            house.daemon.take_in(house.now)
            house.daemon.finish_runs(house.now, "promoted")
        return found

    monkeypatch.setattr(Hooks, "_serves", serves)
    house.hooks.tick(house.now)
    _note_next(house)
    end_running(house.hooks)
    changes = [(row.kind, row.health_state) for row in house.rows()]
    assert changes == [("base", None), ("promotion", "failed"), ("promotion", "pending")]


def test_a_daemon_that_died_before_the_way_back_goes_on_with_it_without_asking_again(house: House) -> None:
    house.start(None, tell(house, "raise SystemExit(7)"))
    house.run()
    house.hooks.tick(house.now)
    (_, _, running), *_ = house.hooks._running.values()
    ended = running.wait()
    house.hooks._note(house.rows()[-1].id or 0, "health", ended, house.now)
    house.hooks = house.new_hooks()
    house.settle()
    assert [row.kind for row in house.rows()] == ["base", "promotion", "rollback"]
    assert len(house.told()) == 1


def test_the_health_of_a_model_that_has_lost_its_place_is_not_asked(house: House) -> None:
    house.start(None, tell(house))
    house.run()
    house.run()
    house.settle()
    assert [row.health_state for row in house.rows()] == [None, "skipped", "ok"]
    assert [told["PROMOTION_GENERATION"] for told in house.told()] == ["2"]


def test_the_way_back_from_an_unhealthy_model_is_not_to_another_unhealthy_one(
    house: House, dropforge: Callable[..., Any]
) -> None:
    # The first one's end is waited for until the second one serves.
    go = house.folder / "go"
    os.mkfifo(go)
    held = f"os.environ['PROMOTION_GENERATION'] == '1' and open({str(go)!r}).read()"
    house.start(None, run(f"import os; {held}; raise SystemExit(7)"))
    house.run()
    house.hooks.tick(house.now)
    assert house.rows()[-1].health_state == "running"
    house.run()
    go.write_text("now")
    house.settle()
    changes = [(row.kind, row.health_state) for row in house.rows()]
    assert changes == [("base", None), ("promotion", "failed"), ("promotion", "failed")]
    assert "rollback_failed" in house.events()
    refused = dropforge("rollback", "--reason", "it swears")
    assert "the model of generation 1 failed its health command" in refused.err


def test_a_command_that_cannot_be_begun_is_its_tracks_trouble_and_is_begun_after_a_pause(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.start(tell(house), more="[tracks.other]\n")
    (house.daemon.settings.inbox_folder / "other").mkdir(exist_ok=True)
    (house.daemon.settings.inbox_folder / "other/a.jsonl").write_bytes(records("other"))
    house.run()
    seconds, tried = [0.0], list[str]()
    troubles = Troubles(lambda: seconds[0])

    def begin(argv: tuple[str, ...], environment: dict[str, str], limit: float) -> Command:
        tried.append(environment["PROMOTION_TRACK"])
        if environment["PROMOTION_TRACK"] == "default" and seconds[0] < 60:
            raise OSError(24, "Too many open files")
        return Command(argv, environment, limit)

    house.hooks = house.new_hooks(begin=begin, troubles=troubles)
    house.settle()
    assert [told["PROMOTION_TRACK"] for told in house.told()] == ["other"]
    assert troubles.words == {"hooks of track default": "Too many open files"}
    house.settle()
    assert sorted(tried) == ["default", "other"], "it is left alone for a while"
    seconds[0] = 60
    house.settle()
    assert [told["PROMOTION_TRACK"] for told in house.told()] == ["other", "default"]
    assert troubles.words == {}
