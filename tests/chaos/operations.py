"""The operations that are killed: the state before each, the operation itself, and how the daemon carries it on."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from sqlmodel import col, select

from daemon.champions import decisions, promotion
from daemon.champions.hooks.changes import Hooks
from daemon.champions.hooks.commands import Command, Ended
from daemon.champions.promotion import ChampionMoved
from daemon.champions.watch import read_watch
from daemon.queue import drops, run_queue
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import DropState, RunState
from daemon.state.tables import Drop, Event, Promotion, Run
from pipeline.decide.policy import WATCH_RETURN
from pipeline.errors import DropforgeError
from tests.chaos.faults import Death
from tests.chaos.house import _SETTINGS, DAY, START, Daemon, build, records, work
from tests.run_owner import judged

NOW = START + DAY + 3_600_000
#: When a run goes on that was postponed for an error of the disk.
LATER = NOW + 600_000


class Operation(NamedTuple):
    """One thing that the daemon, a step or a person does."""

    prepare: Callable[[Path], None]
    """Bring a new workspace to the state before."""
    ready: Callable[[Path], Callable[[], object]]
    """Start on that state whatever does it; return what is then done, and killed, in copies of it."""
    complete: Callable[[Daemon], None]
    """Let the daemon that recovered carry it to its end; raise `AssertionError` if it did not end well."""


def _accepted(daemon: Daemon, name: str, *words: str) -> None:
    (daemon.settings.inbox_folder / name).write_bytes(records(*words))
    daemon.take_in(START)


def _drops(daemon: Daemon) -> list[tuple[str, str]]:
    with transaction(daemon.engine) as session:
        return [(drop.name, drop.state) for drop in session.exec(select(Drop).order_by(col(Drop.name)))]


def _runs(daemon: Daemon) -> list[str]:
    with transaction(daemon.engine) as session:
        return [run.state for run in session.exec(select(Run).order_by(col(Run.id)))]


def _serving(daemon: Daemon) -> tuple[int, list[int | None]]:
    """Return the champion's generation and the runs that were promoted, in their order."""
    with transaction(daemon.engine) as session:
        generation = promotion.champion(session, "default").generation
        done = select(Promotion.run_id)
        return generation, list(session.exec(done.order_by(col(Promotion.generation))).all())


# --- intake


def _inbox(name: str, data: bytes) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        build(folder)
        daemon = Daemon(folder, START)
        _accepted(daemon, "known.jsonl", "known")
        (folder / "inbox" / name).write_bytes(data)

    return prepare


def _taking(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: daemon.take_in(NOW)


def _taken(state: DropState) -> Callable[[Daemon], None]:
    def complete(daemon: Daemon) -> None:
        for _ in range(2):
            daemon.take_in(NOW)
        assert _drops(daemon) == [("known.jsonl", "accepted"), ("new.jsonl", state)]
        place = "rejected" if state == DropState.REJECTED else "done"
        assert (daemon.settings.inbox_folder / place / "new.jsonl").exists()
        assert _runs(daemon) == ["queued"]
        daemon.finish_runs(LATER)
        assert _runs(daemon) == ["succeeded"]

    return complete


# --- the queue


def _waiting_drop(folder: Path) -> None:
    """A drop that waits for a night: a person cancelled the run that it started."""
    build(folder)
    daemon = Daemon(folder, START)
    daemon.night(START)  # nights count from the first look
    _accepted(daemon, "new.jsonl", "new")
    run_queue.cancel(daemon.engine, 1, START)


def _night(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: daemon.night(NOW)


def _night_over(daemon: Daemon) -> None:
    for _ in range(2):
        daemon.night(NOW)
    assert _runs(daemon) == ["cancelled", "queued"]
    daemon.finish_runs(LATER)
    assert _runs(daemon) == ["cancelled", "succeeded"]


def _queued(folder: Path) -> None:
    build(folder)
    _accepted(Daemon(folder, START), "new.jsonl", "new")


def _ticking(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: daemon.dispatcher.tick(NOW)


def _ended(outcome: str) -> Callable[[Daemon], None]:
    def complete(daemon: Daemon) -> None:
        daemon.finish_runs(LATER, outcome)
        with transaction(daemon.engine) as session:
            run = session.get_one(Run, 1)
            assert (run.state, run.outcome, run.failures, run.deaths) == (RunState.SUCCEEDED, outcome, 0, 0)
        assert _drops(daemon) == [("new.jsonl", "accepted")]
        promoted = outcome == "promoted"
        assert _serving(daemon) == ((1, [None, 1]) if promoted else (0, [None]))

    return complete


def _running(folder: Path) -> None:
    build(folder)
    daemon = Daemon(folder, START)
    _accepted(daemon, "new.jsonl", "new")
    daemon.dispatcher.tick(START)


def _stopping(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: daemon.dispatcher.abandon(NOW)


def _at(step: str, outcome: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        build(folder)
        daemon = Daemon(folder, START)
        _accepted(daemon, "new.jsonl", "new")
        daemon.until(step, START, outcome)

    return prepare


def _overtaken(folder: Path) -> None:
    """Bring a second candidate to a verdict, `worse`, before the champion is rolled back from."""
    _came_to("promoted")(folder)
    daemon = Daemon(folder, START)
    _accepted(daemon, "second.jsonl", "second")
    daemon.until("decide", START, "worse")
    decisions.rollback(daemon.engine, daemon.root, "default", Word("it swears", START), to=0)


def _compared_again(daemon: Daemon) -> None:
    daemon.finish_runs(LATER, "not_shown_better")
    with transaction(daemon.engine) as session:
        run = session.get_one(Run, 2)
        assert (run.state, run.outcome, run.failures) == (RunState.SUCCEEDED, "not_shown_better", 0)
    assert _drops(daemon) == [("new.jsonl", "accepted"), ("second.jsonl", "accepted")]
    assert _serving(daemon) == (2, [None, 1, None])


# --- champions


def _two_champions(folder: Path) -> None:
    build(folder)
    daemon = Daemon(folder, START)
    for number, name in enumerate(("one", "two")):
        _accepted(daemon, f"{name}.jsonl", name)
        daemon.finish_runs(START + number * 1000, "promoted")


def _going_back(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: decisions.rollback(daemon.engine, daemon.root, "default", Word("it swears", NOW), to=1)


def _back(daemon: Daemon) -> None:
    if _serving(daemon)[0] == 2:
        decisions.rollback(daemon.engine, daemon.root, "default", Word("it swears", NOW), to=1)
    assert _serving(daemon) == (3, [None, 1, 2, 1])
    champion = daemon.root / "tracks/default/champion"
    assert b"weights of run 1" in (champion / "model.safetensors").read_bytes()
    assert b"weights of run 2" in (champion.with_name("previous") / "model.safetensors").read_bytes()
    with transaction(daemon.engine) as session:
        left = session.exec(select(Promotion).where(Promotion.generation == 2)).one()
    with suppress(ChampionMoved, promotion.Blocked):
        won = judged("promoted", candidate_model_id=left.model_id, champion_generation=3)
        promotion.promote(daemon.engine, daemon.root, 2, won, Word("", NOW))
    assert _serving(daemon) == (3, [None, 1, 2, 1])


def _lost_eleven(folder: Path) -> None:
    """Bring a run to its verdict with eleven drops that the former champion answers better."""
    _two_champions(folder)
    daemon = Daemon(folder, START)
    for number in range(11):
        _accepted(daemon, f"{number}.jsonl", f"new {number}")
    daemon.until("decide", START)


def _proposed(daemon: Daemon) -> None:
    asked = select(Event).where(Event.kind == "return_proposed"), select(Drop).where(col(Drop.watch_run) == 3)
    for _ in range(2):
        with transaction(daemon.engine) as session:
            ended = session.get_one(Run, 3).state == RunState.SUCCEEDED
            found = [len(session.exec(each).all()) for each in asked]
        assert found == ([1, 11] if ended else [0, 0]), "all of it or nothing"
        daemon.finish_runs(LATER)
    assert ended
    with transaction(daemon.engine) as session:
        watch = read_watch(session, "default")
    assert watch is not None
    assert (watch.former, watch.nights, watch.worse, watch.reached) == (1, 1, 11, WATCH_RETURN)


def _half_promoted(folder: Path) -> None:
    """A daemon that died in the middle of a promotion's links, before its row."""
    _at("decide", "promoted")(folder)
    daemon = Daemon(folder, START)
    with patch.object(promotion, "fsync_folder", side_effect=Death), suppress(Death):
        daemon.dispatcher.tick(START)


# --- a person's word, and the commands after it


def _by_hand(step: Callable[[Path], None], settings: str = '[gate]\napproval = "manual"\n') -> Callable[[Path], None]:
    """Bring a workspace with these settings to a state."""

    def prepare(folder: Path) -> None:
        with patch("tests.chaos.house._SETTINGS", _SETTINGS + settings):
            step(folder)

    return prepare


def _came_to(outcome: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        build(folder)
        daemon = Daemon(folder, START)
        _accepted(daemon, "new.jsonl", "new")
        daemon.finish_runs(START, outcome)

    return prepare


def _two_drops(folder: Path) -> None:
    """Bring a candidate of two drops to its verdict, `promoted`."""
    build(folder)
    daemon = Daemon(folder, START)
    _accepted(daemon, "new.jsonl", "new")
    _accepted(daemon, "other.jsonl", "other")
    daemon.until("decide", START, "promoted")


def _withdrawing(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: drops.withdraw(daemon.engine, 1, Word("wrong labels", NOW), daemon.settings)


def _done_without(daemon: Daemon) -> None:
    with transaction(daemon.engine) as session:
        gone = session.get_one(Drop, 1).state == DropState.WITHDRAWN
        unseen = session.get_one(Drop, 2).first_run is None
        runs = session.exec(select(Run).order_by(col(Run.id))).all()
    ended = runs[0].cancel_requested or runs[0].state == RunState.CANCELLED
    assert (ended, unseen, len(runs) == 2) == (gone, gone, gone), "all of it or nothing"
    with suppress(DropforgeError):
        drops.withdraw(daemon.engine, 1, Word("wrong labels", NOW), daemon.settings)
    daemon.finish_runs(LATER, "promoted")
    with transaction(daemon.engine) as session:
        runs = session.exec(select(Run).order_by(col(Run.id))).all()
    assert [(run.state, run.outcome) for run in runs] == [("cancelled", None), ("succeeded", "promoted")]
    assert runs[1].snapshot == [2]
    assert _serving(daemon) == (1, [None, 2])


def _new_answers(folder: Path) -> None:
    """Bring a run to its end that found new answers to old questions in its drop."""
    _came_to("promoted")(folder)
    with transaction(Daemon(folder, START).engine) as session:
        session.get_one(Drop, 1).new_answers = 9


def _accepting(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: drops.accept_answers(daemon.engine, 1, Word("the prices changed", NOW), daemon.settings)


def _answered(daemon: Daemon) -> None:
    with transaction(daemon.engine) as session:
        drop, queued = session.get_one(Drop, 1), session.get(Run, 2) is not None
        events = session.exec(select(Event).where(Event.kind == "answers_accepted")).all()
    found = (drop.answers_accepted, drop.first_run is None, queued, len(events) == 1)
    assert found in {(False,) * 4, (True,) * 4}, "all of it or nothing"
    for _ in range(2):
        _accepting(daemon.folder)()
    daemon.finish_runs(LATER)
    assert _runs(daemon) == ["succeeded", "succeeded"]


def _previewed(folder: Path) -> None:
    """Bring a drop that waits for a night to the result of its preview."""
    _came_to("promoted")(folder)
    daemon = Daemon(folder, START)
    _accepted(daemon, "next.jsonl", "next")
    run_queue.cancel(daemon.engine, 2, START)
    daemon.until("preview", START)


def _told(daemon: Daemon) -> None:
    daemon.finish_runs(LATER)
    work(daemon.root, "not_shown_better")
    daemon.dispatcher.tick(LATER)
    with transaction(daemon.engine) as session:
        preview = session.get_one(Drop, 2).preview
        events = session.exec(select(Event).where(Event.kind == "drop_previewed")).all()
    assert (preview and preview["points"], len(events)) == (31.0, 1)
    assert not daemon.dispatcher.describe().startswith("the champion answers")
    run_queue.enqueue_by_hand(daemon.engine, "default", LATER)
    daemon.finish_runs(LATER)
    assert _runs(daemon) == ["succeeded", "cancelled", "succeeded"]


def _approving(folder: Path) -> Callable[[], object]:
    daemon = Daemon(folder, NOW)
    return lambda: decisions.approve(daemon.engine, daemon.root, 1, Word("", NOW, "ada"))


def _approved(daemon: Daemon) -> None:
    for _ in range(2):
        with suppress(DropforgeError):
            _approving(daemon.folder)()
    assert _serving(daemon) == (1, [None, 1])
    with transaction(daemon.engine) as session:
        row = session.exec(select(Promotion).where(Promotion.generation == 1)).one()
        assert (row.kind, row.approved_by, session.get_one(Run, 1).outcome) == ("promotion", "ada", "promoted")


class _Over(Command):
    """A command that has ended."""

    def __init__(self, argv: tuple[str, ...], _environment: dict[str, str], _seconds: float) -> None:
        """Take the command's only argument for what was wrong."""
        self._ended = Ended(None if argv == ("well",) else argv[0], "it said this")

    def ended(self) -> Ended:
        return self._ended

    def wait(self) -> Ended:
        return self._ended

    def kill(self) -> None:
        """Do nothing: it is over."""


def _hooks(daemon: Daemon) -> Hooks:
    return Hooks(daemon.engine, daemon.settings, _Over, _believe)


def _believe(folder: Path, *, stop: threading.Event) -> None:
    """Take it for granted that a model answers: the scripted ones are none."""
    assert (folder / "config.json").exists()
    assert not stop.is_set()


def _hooking(folder: Path) -> Callable[[], object]:
    hooks = _hooks(Daemon(folder, NOW))

    def ticks() -> None:
        for _ in range(4):
            hooks.tick(NOW)

    return ticks


def _hooked(daemon: Daemon) -> None:
    _hooking(daemon.folder)()
    with transaction(daemon.engine) as session:
        row = session.exec(select(Promotion).where(Promotion.generation == 1)).one()
    assert (row.hook_state, row.hook_error, row.hook_output) == ("failed", "badly", "it said this")
    assert row.health_state == "ok"
    assert _serving(daemon) == (1, [None, 1])


def _giving_up(folder: Path) -> Callable[[], object]:
    """Note that the health command failed and go back; in this thread, since strace counts by thread."""
    daemon = Daemon(folder, NOW)
    hooks = _hooks(daemon)

    def act() -> None:
        with transaction(daemon.engine) as session:
            row = session.exec(select(Promotion).where(Promotion.generation == 1)).one()
        if row.health_state != "failed":
            hooks._note(row.id or 0, "health", Ended("exit code 7", ""), NOW)
            with patch("daemon.champions.hooks.changes._TROUBLE_SECONDS", 0):
                hooks._roll_back(row, "exit code 7", NOW)

    return act


def _given_up(daemon: Daemon) -> None:
    hooks = _hooks(daemon)
    for _ in range(6):
        hooks.tick(NOW)
        for thread in hooks._rollbacks.values():
            thread.join()
    with transaction(daemon.engine) as session:
        rows = session.exec(select(Promotion).order_by(col(Promotion.generation))).all()
    assert [(row.kind, row.health_state) for row in rows] == [
        ("base", None),
        ("promotion", "failed"),
        ("rollback", None),
    ]
    assert rows[1].health_error == "exit code 7"


def _starting(folder: Path) -> Callable[[], object]:
    return lambda: Daemon(folder, NOW)


def _started(daemon: Daemon) -> None:
    assert _serving(daemon) == (0, [None])
    _accepted(daemon, "new.jsonl", "new")
    daemon.finish_runs(LATER)
    assert _runs(daemon) == ["succeeded"]


OPERATIONS = {
    "intake of an accepted drop": Operation(
        _inbox("new.jsonl", records("a", "b")), _taking, _taken(DropState.ACCEPTED)
    ),
    "intake of a rejected drop": Operation(
        _inbox("new.jsonl", b'{"output": 1}\n'), _taking, _taken(DropState.REJECTED)
    ),
    "intake of a duplicate": Operation(_inbox("new.jsonl", records("known")), _taking, _taken(DropState.DUPLICATE)),
    "enqueue at night": Operation(_waiting_drop, _night, _night_over),
    "claim": Operation(_queued, _ticking, _ended("not_shown_better")),
    "interrupt": Operation(_running, _stopping, _ended("not_shown_better")),
    "publish of a model": Operation(_at("merge", "promoted"), _ticking, _ended("promoted")),
    "finish": Operation(_at("decide", "not_shown_better"), _ticking, _ended("not_shown_better")),
    "verdict that comes too late": Operation(_overtaken, _ticking, _compared_again),
    "promote": Operation(_at("decide", "promoted"), _ticking, _ended("promoted")),
    "roll back": Operation(_two_champions, _going_back, _back),
    "propose a return": Operation(_lost_eleven, _ticking, _proposed),
    "withdraw, a run in hand": Operation(_two_drops, _withdrawing, _done_without),
    "accept new answers": Operation(_new_answers, _accepting, _answered),
    "preview of a drop": Operation(_previewed, _ticking, _told),
    "approve": Operation(_by_hand(_came_to("promoted")), _approving, _approved),
    "hook": Operation(
        _by_hand(_came_to("promoted"), '[hooks]\nafter_promotion = ["badly"]\nhealth = ["well"]\n'), _hooking, _hooked
    ),
    "roll back for ill health": Operation(
        _by_hand(_came_to("promoted"), '[hooks]\nhealth = ["exit code 7"]\n'), _giving_up, _given_up
    ),
    "first start": Operation(build, _starting, _started),
    "recovery of a promotion": Operation(_half_promoted, _starting, _ended("promoted")),
}
