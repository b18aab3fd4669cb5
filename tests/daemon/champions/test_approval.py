"""A win that waits for a person, and a model that a person makes the champion whatever its verdict."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, select

from daemon.champions import decisions, promotion
from daemon.champions.promotion import Blocked
from daemon.queue import drops
from daemon.queue.snapshots import waiting_drops
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.tables import Drop, Event, Promotion, Run
from daemon.storage import gc
from daemon.system.folders import WorkFolder
from daemon.system.programs import who
from daemon.views.overview import Overview
from pipeline import durable
from pipeline.contract import LOG_NAME
from pipeline.errors import DropforgeError
from tests.chaos.house import START, Daemon, build, records

PINNED = '[gate]\non = "pinned"\n'
MANUAL = '[gate]\non = "pinned"\napproval = "manual"\n'


class House:
    """A workspace, a daemon on it, and the runs that it makes."""

    def __init__(self, folder: Path, settings: str = MANUAL) -> None:
        self.folder = folder
        self.now = START
        self.runs = 0
        build(folder)
        self.daemon = self.restart(settings)

    def restart(self, settings: str) -> Daemon:
        """Start a daemon with other settings."""
        path = self.folder / "dropforge.toml"
        head, _, _ = path.read_text().partition("#more\n")
        path.write_text(f"{head}#more\n{settings}")
        self.daemon = Daemon(self.folder, self.now)
        return self.daemon

    @property
    def root(self) -> Path:
        return self.daemon.root

    def run(self, outcome: str = "promoted") -> int:
        """Let a run with a drop of its own come to a verdict; return its number."""
        number = self._drop()
        self.daemon.finish_runs(self.now, outcome)
        return number

    def row(self, run: int) -> Run:
        with transaction(self.daemon.engine) as session:
            return session.get_one(Run, run)

    def approve(self, run: int) -> Promotion:
        self.now += 1000
        return decisions.approve(self.daemon.engine, WorkFolder(self.root), run, Word("", self.now, "ada"))

    def force(self, run: int, **how: Any) -> Promotion:
        self.now += 1000
        return decisions.force(
            self.daemon.engine, WorkFolder(self.root), run, Word("I know better", self.now, "ada"), **how
        )

    def back(self, to: int | None = None) -> Promotion:
        self.now += 1000
        return decisions.rollback(
            self.daemon.engine, WorkFolder(self.root), "default", Word("it swears", self.now), to=to
        )

    @property
    def serves(self) -> tuple[int, bytes]:
        """The champion's generation, and the weights that its link leads to."""
        with transaction(self.daemon.engine) as session:
            generation = promotion.champion(session, "default").generation
        return generation, (self.root / "tracks/default/champion/model.safetensors").read_bytes().rpartition(b"}")[2]

    def events(self) -> list[str]:
        with transaction(self.daemon.engine) as session:
            return [one.kind for one in session.exec(select(Event).order_by(col(Event.id)))]

    def withdraw(self, drop: int) -> None:
        self.now += 1000
        drops.withdraw(self.daemon.engine, drop, Word("the customer asked for it", self.now), self.daemon.settings)

    def at(self, step: str, outcome: str = "promoted") -> int:
        """Let a run with a drop of its own come to the result of `step`; return its number."""
        number = self._drop()
        self.daemon.until(step, self.now, outcome)
        return number

    def _drop(self) -> int:
        self.runs += 1
        self.now += 1000
        (self.daemon.settings.inbox_folder / f"{self.runs}.jsonl").write_bytes(records(f"word {self.runs}"))
        self.daemon.take_in(self.now)
        return self.runs

    def drop_state(self, number: int) -> str:
        with transaction(self.daemon.engine) as session:
            return session.get_one(Drop, number).state


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


# --- a win that waits


def test_only_a_win_that_waits_is_approved(house: House) -> None:
    run = house.run("worse")
    with pytest.raises(DropforgeError, match=f"run {run} ended as worse: no win of it waits for approval") as refused:
        house.approve(run)
    assert f"dropforge promote {run} --force --reason TEXT" in refused.value.hint
    (house.root / f"runs/{run}/merge.json").unlink()
    with pytest.raises(DropforgeError, match="published no model"):
        house.force(run)
    assert house.serves[0] == 0


def test_a_win_over_a_champion_that_has_gone_is_compared_again_before_it_waits(house: House) -> None:
    house.run()
    house.at("decide")
    house.approve(1)
    house.daemon.finish_runs(house.now, "promoted")
    assert house.row(2).outcome == "awaiting_approval"
    verdict = durable.read_json(house.root / "runs/2/decide.json")
    assert verdict["champion_generation"] == 1, "what it waits with was compared with today's champion"
    assert house.approve(2).generation == 2


def test_a_win_of_a_blocked_model_is_over_and_is_said_to_come_back_by_force(
    tmp_path: Path, dropforge: Callable[..., Any]
) -> None:
    house = House(tmp_path, PINNED)
    first = house.run()
    house.back()
    run = house.at("decide")
    # The new drop repeats old rows: the same data makes the same model.
    identity = durable.read_json(house.root / f"runs/{first}/merge.json")["model_id"]
    (path,) = (house.root / f"runs/{run}/attempts").glob("decide-*/result.json")
    result = durable.read_json(path)
    result["artifact"]["candidate_model_id"] = identity
    durable.write_json(path, result)
    house.daemon.finish_runs(house.now)
    assert (house.row(run).state, house.row(run).outcome) == ("succeeded", "awaiting_approval")
    assert house.serves == (2, b"base weights")
    with transaction(house.daemon.engine) as session:
        assert waiting_drops(session, "default") == 0, "it is not trained again every night"
    with pytest.raises(Blocked):
        house.approve(run)
    why = "won, but its model is blocked: the track was rolled back to generation 0: it swears"
    for words in (("status",), ("runs",), ("show", str(run))):
        said = dropforge(*words).out
        assert why in said, words
        assert "waits" not in said, words
    assert f"{why} (dropforge promote {run} --force --reason TEXT takes it all the same)" in said
    told = dropforge("status", "--json").json
    assert told["awaiting"] == []
    assert [(one["id"], one["outcome"], one["blocker"]) for one in told["blocked"]] == [
        (run, "blocked", why.removeprefix("won, but ")),
    ]


def test_a_damaged_verdict_is_named_where_it_is_asked_for_and_ends_nothing_else(
    house: House, dropforge: Callable[..., Any]
) -> None:
    run = house.run()
    log = next((house.root / f"runs/{run}/attempts").glob("train-*")) / LOG_NAME
    log.write_text("trained\n")
    path = house.root / f"runs/{run}/decide.json"
    path.write_bytes(b"\xff")
    for words in (("status",), ("status", "--json"), ("runs",), ("champion",), ("history",), ("logs", str(run))):
        done = dropforge(*words)
        assert (done.code in {0, 69}, done.err) == (True, ""), words
    for words in (("show", str(run)), ("report", str(run))):
        done = dropforge(*words)
        assert done.code == 1, words
        assert f"error: the verdict of run {run} is damaged: {path}\nhint: bring runs/{run}/decide.json" in done.err
    assert house.approve(run).generation == 1, "the row has what it needs"
    assert dropforge("drops", "withdraw", "1", "--reason", "deletion").err == ""


def test_a_model_whose_files_are_not_what_they_were_is_neither_approved_nor_forced(house: House) -> None:
    run = house.run()
    (model,) = (house.root / "models").iterdir()
    (model / "model.safetensors").write_bytes(b"other")
    for act in (house.approve, house.force):
        with pytest.raises(DropforgeError, match=f"the model of run {run} has changed"):
            act(run)
    assert house.serves[0] == 0


def test_a_setting_of_today_that_asks_for_a_person_holds_for_the_run_in_hand(tmp_path: Path) -> None:
    house = House(tmp_path, "")
    house.at("decide")
    house.restart(MANUAL).finish_runs(house.now, "promoted")
    assert house.row(1).outcome == "awaiting_approval"


def test_a_waiting_model_is_kept_until_another_champion_has_come(house: House) -> None:
    house.restart(MANUAL + "[gc]\nkeep_models = 0\nautomatic = false\n")
    for _ in range(2):
        house.run()
    gc.collect(house.daemon.engine, house.daemon.settings, house.now + 90 * 86_400_000)
    assert len(list((house.root / "models").iterdir())) == 2
    house.approve(2)
    gc.collect(house.daemon.engine, house.daemon.settings, house.now + 90 * 86_400_000)
    assert [path.name for path in (house.root / "models").iterdir()] == [
        durable.read_json(house.root / "runs/2/merge.json")["model_id"]
    ]
    with pytest.raises(DropforgeError, match="it was collected"):
        house.force(1)


# --- what is shown of the drops


def test_everything_that_shows_a_champion_marks_its_withdrawn_drops(
    house: House, dropforge: Callable[..., Any]
) -> None:
    house.approve(house.run())
    house.withdraw(1)
    line = "trained on drop 1 (1.jsonl), withdrawn since: the customer asked for it"
    assert line in dropforge("champion").out
    assert f"track default, generation 1: {line}" in dropforge("history").out
    assert "1.jsonl  withdrawn since: the customer asked for it" in dropforge("show", "1").out
    (drop,) = dropforge("show", "1", "--json").json["run"]["taken_out"]
    assert (drop["id"], drop["state"], drop["reason"]) == (1, "withdrawn", "the customer asked for it")
    (told,) = dropforge("champion", "--json").json["champions"]
    assert told["data"][0]["state"] == "withdrawn"


# --- whatever the verdict


def test_a_run_that_lost_is_forced(house: House) -> None:
    run = house.run("worse")
    tried: list[Path] = []
    row = house.force(run, try_out=tried.append)
    assert (row.kind, row.overrode, row.run_id) == ("forced", "worse", run)
    assert (row.reason, row.approved_by) == ("I know better", "ada")
    assert house.serves == (1, b"weights of run 1")
    assert tried == [house.root / row.model_path]
    assert house.row(run).outcome == "worse", "the verdict stays what it was"
    assert house.events().count("forced") == 1
    with pytest.raises(DropforgeError, match="is the champion of track default already"):
        house.force(run)


def test_a_blocked_model_is_brought_back_by_force_and_may_serve_again(tmp_path: Path) -> None:
    house = House(tmp_path, "")
    run = house.run()
    house.back()
    assert house.force(run).generation == 3
    assert house.serves == (3, b"weights of run 1")
    house.run()
    kinds = [one.kind for one in Overview.of(house.daemon.settings).history("default")]
    assert kinds == ["promotion", "forced", "rollback", "promotion", "base"]
    house.back()
    assert house.serves == (5, b"weights of run 1")


def test_a_waiting_win_that_is_forced_is_no_longer_waited_for(house: House) -> None:
    run = house.run()
    assert house.force(run).overrode == "awaiting_approval"
    assert house.row(run).outcome == "promoted"
    assert Overview.of(house.daemon.settings).wins(blocked=False) == []


# --- what people see


def test_everything_that_shows_the_run_says_that_it_waits(house: House, dropforge: Callable[..., Any]) -> None:
    run = house.run()
    for words in (("status",), ("runs",), ("show", str(run))):
        said = dropforge(*words).out
        assert "promoted: 0.0" not in said, words
        assert "won, waits for approval (dropforge promote 1): 0.0" in said, words
    assert "run 1 of track default: won, waits for approval" in dropforge("status").out
    assert [one["id"] for one in dropforge("status", "--json").json["awaiting"]] == [1]
    done = dropforge("promote", "1", "--reason", "looked at it")
    assert (done.code, done.err) == (0, "")
    assert "serves model" in done.out
    assert dropforge("status", "--json").json["awaiting"] == []
    assert "; looked at it" in dropforge("history").out
    assert f"approved by {who()}" in dropforge("history").out


def test_the_command_says_what_serves_again_and_what_is_blocked(
    house: House, dropforge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # That a real one is loaded, tests/daemon/champions/test_smoke_test.py says.
    monkeypatch.setattr("daemon.cli.handover.require_answer", lambda _folder: None)
    house.approve(house.run())
    done = dropforge("rollback", "--reason", "it swears")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1].endswith("again, as generation 2")
    assert "is blocked" in done.out
    assert dropforge("rollback").code == 2


def test_the_story_is_told_truly_after_every_kind_of_change(house: House, dropforge: Callable[..., Any]) -> None:
    house.run()
    house.approve(1)
    house.run("worse")
    house.force(2)
    house.back()
    assert dropforge("drops", "withdraw", "2", "--reason", "it swears").code == 0
    told = dropforge("history", "--json").json["history"]
    assert [(one["generation"], one["kind"], one["run"], one["drops"]) for one in told] == [
        (3, "rollback", 1, ["1.jsonl"]),
        (2, "forced", 2, ["1.jsonl", "2.jsonl"]),
        (1, "promotion", 1, ["1.jsonl"]),
        (0, "base", None, []),
    ]
    assert [one["until"] for one in told] == [None, *(one["since"] for one in told[:-1])]
    assert [one["approved_by"] for one in told] == [None, "ada", "ada", None]
    table = dropforge("history").out
    assert "forced by ada over worse: I know better" in table
    for one in told:
        (seen,) = dropforge("history", "--at", one["since"], "--json").json["history"]
        assert seen["generation"] == one["generation"]
    assert dropforge("history", "--at", "2020-01-01", "--json").json["history"] == []
    assert "no champion at 2020-01-01 00:00:00" in dropforge("history", "--at", "2020-01-01").out
    forced = dropforge("history", "--at", told[1]["since"]).out
    sha256 = told[1]["data"][1]["sha256"]
    assert f"drop 2: 2.jsonl, train, 1 row, sha256 {sha256}, withdrawn since: it swears" in forced
    assert "verdict of run 2: worse: 0.0 points" in forced
    later = dropforge("history", "--at", "2999-01-01")
    assert (later.code, later.out) == (2, "")
    assert f"2999-01-01 00:00:00 is in the future: it is {datetime.now().astimezone():%Y-%m-%d }" in later.err


def test_a_time_without_an_offset_is_in_the_machines_zone(
    house: House, dropforge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time  # noqa: PLC0415

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert dropforge("history", "--at", "2026-01-01T08:59:59", "--json").json["history"] == []
        (one,) = dropforge("history", "--at", "2026-01-01T09:00:00", "--json").json["history"]
        assert one["generation"] == 0
        (same,) = dropforge("history", "--at", "2026-01-01T00:00:00Z", "--json").json["history"]
        assert same == one
    finally:
        monkeypatch.undo()
        time.tzset()
    assert house.serves[0] == 0
