"""
The real thing held to a model of a hundred lines, over whatever people, clocks, full disks and crashes do to it.

Sampled by default, with a fixed seed that is printed; DROPFORGE_CHAOS=whole takes more and longer histories.
"""

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.exc import DatabaseError
from sqlmodel import Session, col, select

from daemon.champions import decisions, promotion
from daemon.champions.promotion import Blocked, require_generation
from daemon.queue import drops, run_queue, suspects
from daemon.queue.attempt_ends import Leave, Then
from daemon.queue.states import Claim
from daemon.settings.model import RetrySettings
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.states import AWAITING
from daemon.state.tables import Drop, Promotion, Run, Track
from daemon.state.troubles import Troubles
from pipeline.artifacts import TrialScores, Verdict
from pipeline.config import RunConfig
from pipeline.errors import DropforgeError
from pipeline.models.manifest import model_id
from tests import run_owner
from tests.chaos.faults import Death, Trouble
from tests.chaos.house import MEMORY, START, Daemon, build, records
from tests.chaos.invariants import broken
from tests.chaos.world import BACKOFF, LIMIT, SETTLE, World
from tests.made_artifacts import made_report, made_spec, model_of
from tests.model_folder import write_model

SEED = 20_261_124
RETRY = RetrySettings(limit=LIMIT, backoff_seconds=BACKOFF / 1000)
CONFIG = RunConfig(track="default", base_model="/base", base_model_id="b", salt="s")
MODELS = ("one", "two", "three")
CONTENTS = (*"abcdefgh", "bad")
BEGINNINGS = ("", "back", "search", "found")
PICK = st.integers(0, 7)


def configure(_session: Session, _track: Track) -> RunConfig:
    return CONFIG


def written(content: str) -> bytes:
    return b'{"output": 1}\n' + content.encode() if content.startswith("bad") else records(content)


class House(RuleBasedStateMachine):
    """People, a disk and a clock around one daemon."""

    def __init__(self) -> None:
        """Start on a new workspace."""
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="dropforge-model-", dir=MEMORY))
        build(self.folder, SETTLE)
        self.now, self.monotonic, self.files = START, 0.0, 0
        self.trouble: Trouble | None = None
        self.daemon = Daemon(self.folder, self.now)
        self.world = World()
        self.inbox: dict[str, tuple[str, float | None]] = {}
        self.models = {name: write_model(self.folder / "models" / name, name.encode()) for name in MODELS}
        self.models["base"] = model_id(self.folder / "base")
        self.seen: list[str] = []

    def teardown(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder)

    # --- what carries the rest

    def restart(self) -> None:
        """Start the daemon anew: it has forgotten which files have been quiet for how long."""
        self.inbox = {name: (content, None) for name, (content, _) in self.inbox.items()}
        self.daemon = Daemon(self.folder, self.now)

    def claims(self) -> list[Claim]:
        """Return the claim of the run in hand, as its owner has it."""
        with transaction(self.daemon.engine) as session:
            running = session.exec(select(Run).where(Run.state == "running")).all()
        return [Claim(run.id or 0, run.token or "") for run in running]

    def do(self, act: Callable[[], object]) -> bool:
        """Do it under the trouble that was ordered; say whether it came, after which it has been done again."""
        trouble = self.trouble
        if trouble is None:
            act()
            return False
        died = False
        with trouble.around():
            try:
                act()
            except Death:
                died = True
            except (OSError, DatabaseError, DropforgeError):
                if not trouble.hit:
                    raise
        if not trouble.hit:
            return False
        self.trouble = None
        self.seen.append(trouble.hit[0])
        if died:
            self.restart()
        with suppress(DropforgeError):
            act()
        return True

    def person(
        self, act: Callable[[], object], *, may: bool, refusal: type[DropforgeError] | tuple[type[DropforgeError], ...]
    ) -> None:
        """Let a person do what the model says that they may, or be refused."""
        refused = False

        def ask() -> None:
            nonlocal refused
            try:
                act()
            except refusal:
                refused = True

        came = self.do(ask)
        assert came or refused == (not may)

    @initialize(name=st.sampled_from(MODELS), failures=st.integers(0, 2), then=st.sampled_from(BEGINNINGS))
    def begin(self, name: str, failures: int, then: str) -> None:
        """Begin with a champion that a run made, at the first try or a later one, and what may come after it."""
        self.drop("a", settle=True)
        for _ in range(failures):
            self.fail(retryable=True)
            self.set_clock(3_600)
        self.win(name)
        if then == "back":
            self.roll_back(None)
            self.drop("b", settle=True)
        elif then:
            self.drop("b", settle=True)
            self.drop("c", settle=True)
            for _ in range(1 + (then == "found")):
                self.lose(worse=True)

    # --- the disk and the clock

    @precondition(lambda self: self.trouble is None)
    @rule(kind=st.sampled_from(["full", "death"]), after=st.integers(0, 12))
    def order_trouble(self, kind: str, after: int) -> None:
        """Let one of the next things that are done meet with trouble."""
        self.trouble = Trouble(kind, after)

    @rule(seconds=st.sampled_from([-400_000, -3_600, -40, 40, 3_600, 90_000, 400_000]))
    def set_clock(self, seconds: int) -> None:
        """Let the wall clock jump; nights behind a jump back have been taken."""
        self.now += seconds * 1000

    @rule()
    def crash(self) -> None:
        """End the daemon and start it again, which may itself be cut off."""
        self.do(self.restart)

    # --- the inbox

    @rule(content=st.sampled_from(CONTENTS), settle=st.booleans())
    def drop(self, content: str, settle: bool) -> None:
        """Drop a file; others may have had the same content."""
        self.files += 1
        name = f"{self.files:03}.jsonl"
        (self.folder / "inbox" / name).write_bytes(written(content))
        self.inbox[name] = (content, None)
        if settle:
            self.look(0.0)
            self.look(SETTLE)

    @precondition(lambda self: self.inbox)
    @rule(pick=PICK, content=st.sampled_from(CONTENTS))
    def rewrite(self, pick: int, content: str) -> None:
        """Write a file anew that has not been taken."""
        name = sorted(self.inbox)[pick % len(self.inbox)]
        path = self.folder / "inbox" / name
        path.unlink()  # a new inode: what is written in place within a tick of the clock may look unchanged
        path.write_bytes(written(content))
        self.inbox[name] = (content, None)

    @rule(seconds=st.sampled_from([0.0, 3.0, 6.0]))
    def look(self, seconds: float) -> None:
        """Let time pass and the daemon look into the inbox."""
        self.monotonic += seconds
        before = self._by_age()
        if self.do(lambda: self.daemon.take_in(self.now, self.monotonic)):
            # Some were taken, some not: once all is quiet, they all are.
            for _ in range(2):
                self.monotonic += SETTLE
                self.daemon.take_in(self.now, self.monotonic)
            for name in before:
                self.world.take(name, self.inbox.pop(name)[0], self.now)
            return
        for name in before:
            content, since = self.inbox[name]
            if since is None:
                self.inbox[name] = (content, self.monotonic)
            elif self.monotonic - since >= SETTLE:
                self.world.take(name, content, self.now)
                del self.inbox[name]

    def _by_age(self) -> list[str]:
        inbox = self.folder / "inbox"
        return sorted(self.inbox, key=lambda name: ((inbox / name).stat().st_ctime_ns, name))

    # --- the queue

    @rule()
    def night(self) -> None:
        """Let the schedule look."""
        self.do(lambda: self.daemon.night(self.now))
        self.world.night(self.now)

    @rule()
    def claim(self) -> None:
        """Let the daemon take the next run."""

        def act() -> None:
            suspects.go_on(self.daemon.engine, self.daemon.settings, self.now, Troubles())
            if not self.claims():
                run_owner.claim(self.daemon.engine, self.now, configure)

        self.do(act)
        self.world.go_on(self.now)
        self.world.claim(self.now)

    @precondition(lambda self: self.world.runs)
    @rule()
    def interrupt(self) -> None:
        """Let the daemon stop with a run in hand."""
        if not self._in_hand():
            return
        self._end(lambda claim: run_owner.leave(self.daemon.engine, claim, self.now, Then.INTERRUPT))
        self.world.runs[self.world.running - 1].state = "waiting"

    @precondition(lambda self: self.world.runs)
    @rule(retryable=st.booleans())
    def fail(self, retryable: bool) -> None:
        """Let the run in hand fail."""
        if not self._in_hand():
            return
        leave = Leave(Then.RETRY if retryable else Then.FAIL, DropforgeError("out of luck", "try again"))
        self._end(lambda claim: run_queue.leave(self.daemon.engine, claim, leave, self.now, RETRY))
        self.world.fail(self.world.running, self.now, retryable=retryable)

    @precondition(lambda self: self.world.runs)
    @rule(worse=st.booleans())
    def lose(self, worse: bool) -> None:
        """Let the run's candidate lose; badly, if `worse`."""
        number = self._in_hand()
        if not number:
            return
        self._compare(number, 0.5 if worse else 0.005)

        def conclude(claim: Claim) -> None:
            follow = self._following("worse" if worse else "not_shown_better")
            run_owner.finish(self.daemon.engine, claim, run_owner.ending("worse"), self.now, follow)

        self._end(conclude)
        self.world.judge(number, self.now, worse=worse)

    def _compare(self, number: int, p_value: float = 0.005) -> None:
        """Lay down what a control's evaluation says of the trial before it."""
        spec = made_spec(self.daemon.root, "evaluate", run=number)
        Path(spec.root, spec.folder).mkdir(parents=True, exist_ok=True)
        made = made_report(spec, trial=TrialScores(groups=120, wins=5, losses=23, p_value=p_value))
        Path(spec.root, f"runs/{number}/evaluate.json").write_text(made.model_dump_json())

    def _following(self, outcome: str) -> Callable[[Session, Run], None]:
        """Return what follows from a verdict for the new drops, as `apply_verdict` lets it follow."""
        said = run_owner.judged(outcome, blames_new_drops=outcome == "worse")
        # A trial that guards alone stopped may serve after its control; here each lost by its own verdict.
        return lambda session, run: suspects.follow_verdict(
            session, self.daemon.settings, run, said, self.now, serve=lambda _trial: None
        )

    @precondition(lambda self: self.world.runs)
    @rule(name=st.sampled_from(MODELS))
    def win(self, name: str) -> None:
        """Let the run's candidate win; a blocked model is for a person to take."""
        number = self._in_hand()
        if not number:
            return
        won = self._lay(number, name)

        def conclude(claim: Claim) -> None:
            follow = self._following("promoted")
            try:
                promotion.promote(self.daemon.engine, self.daemon.root, number, won, Word("", self.now))
            except Blocked:
                run_owner.finish(self.daemon.engine, claim, (AWAITING, won), self.now, follow)
            else:
                run_owner.finish(self.daemon.engine, claim, ("promoted", won), self.now, follow)

        self._end(conclude)
        if name in self.world.blocked:
            self.world.wait(number, self.now)
        else:
            self.world.promote(number, name)
            self.world.judge(number, self.now, won=True)

    @precondition(lambda self: self.world.runs)
    @rule(name=st.sampled_from(MODELS))
    def win_and_wait(self, name: str) -> None:
        """Let the run's candidate win where a person has to say yes."""
        number, generation = self._in_hand(), len(self.world.champions) - 1
        if not number:
            return
        won = self._lay(number, name)

        def conclude(claim: Claim) -> None:
            def still(session: Session, run: Run) -> None:
                require_generation(session, run.track, generation)
                self._following("promoted")(session, run)

            run_owner.finish(self.daemon.engine, claim, (AWAITING, won), self.now, still)

        self._end(conclude)
        self.world.wait(number, self.now)

    def _lay(self, number: int, name: str) -> Verdict:
        """Lay down what a run with a model leaves, and return its verdict."""
        identity, folder = self.models[name], self.daemon.root / "runs" / str(number)
        if not (self.daemon.root / "models" / identity).exists():
            shutil.copytree(self.folder / "models" / name, self.daemon.root / "models" / identity)
        self._compare(number)
        model = model_of(f"models/{identity}", identity)
        over = len(self.world.champions) - 1
        verdict = run_owner.judged("promoted", candidate_model_id=identity, champion_generation=over)
        for artifact in (model, verdict):
            (folder / f"{artifact.step}.json").write_text(artifact.model_dump_json())
        self.world.runs[number - 1].model = name
        return verdict

    @precondition(lambda self: self.world.runs)
    @rule(pick=PICK)
    def approve(self, pick: int) -> None:
        """Say yes to a win, which only one that waits gets, if its model is not blocked."""
        number = pick % len(self.world.runs) + 1
        name = self.world.runs[number - 1].model
        may = number in self.world.waits and name not in self.world.blocked
        act = lambda: decisions.approve(self.daemon.engine, self.daemon.root, number, Word("", self.now))  # noqa: E731
        self.person(act, may=may, refusal=(DropforgeError, Blocked))
        if may:
            self.world.promote(number, name)

    @precondition(lambda self: self.world.runs)
    @rule(pick=PICK)
    def force(self, pick: int) -> None:
        """Make a run's model the champion whatever its verdict."""
        number = pick % len(self.world.runs) + 1
        may = self.world.force(number)
        act = lambda: decisions.force(self.daemon.engine, self.daemon.root, number, Word("mine", self.now))  # noqa: E731
        self.person(act, may=may, refusal=(DropforgeError,))

    def _in_hand(self) -> int:
        """Return the run in hand, which is the next one that is due if there was none; 0 if none is due either."""
        if not self.world.running:
            self.claim()
        return self.world.running

    def _end(self, conclude: Callable[[Claim], object]) -> None:
        """Let the owner of the run in hand end it."""

        def act() -> None:
            for claim in self.claims():
                conclude(claim)

        self.do(act)

    # --- people

    @precondition(lambda self: self.world.runs)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        """Cancel a run; one in hand is ended by its owner."""
        number = pick % len(self.world.runs) + 1
        run = self.world.runs[number - 1]

        def act() -> None:
            run_queue.cancel(self.daemon.engine, number, self.now)
            for claim in self.claims():
                if claim.run_id == number:
                    run_owner.leave(self.daemon.engine, claim, self.now, Then.CANCEL)

        may = run.state in {"queued", "waiting", "running"} or number in self.world.waits
        self.person(act, may=may, refusal=DropforgeError)
        if may:
            self.world.end(number, "cancelled")
            self.world.waits.discard(number)

    @precondition(lambda self: self.world.runs)
    @rule(pick=PICK)
    def retry(self, pick: int) -> None:
        """Retry a run."""
        number = pick % len(self.world.runs) + 1
        may = self.world.retry(number, self.now)
        act = lambda: run_owner.retry(self.daemon.engine, number, self.now)  # noqa: E731
        self.person(act, may=may, refusal=DropforgeError)

    @precondition(lambda self: self.world.drops)
    @rule(pick=PICK)
    def withdraw(self, pick: int) -> None:
        """Withdraw a drop."""
        number = pick % len(self.world.drops) + 1
        drop = self.world.drops[number - 1]
        may = drop.state in {"accepted", "suspended"}
        act = lambda: drops.withdraw(self.daemon.engine, number, Word("wrong", self.now), self.daemon.settings)  # noqa: E731
        self.person(act, may=may, refusal=DropforgeError)
        if may:
            self.world.withdraw(number, self.now)
            self._end_cancelled()

    def _end_cancelled(self) -> None:
        """Let the owner of a run that is to be cancelled end it."""

        def act() -> None:
            with transaction(self.daemon.engine) as session:
                asked = session.exec(select(Run.id).where(col(Run.cancel_requested), Run.state == "running")).all()
            for claim in self.claims():
                if claim.run_id in asked:
                    run_owner.leave(self.daemon.engine, claim, self.now, Then.CANCEL)

        self.do(act)

    @precondition(lambda self: self.world.drops)
    @rule(pick=PICK)
    def restore(self, pick: int) -> None:
        """Restore a drop."""
        number = pick % len(self.world.drops) + 1
        may = self.world.restore(number, self.now)
        act = lambda: drops.restore(self.daemon.engine, number, Word("right", self.now), self.daemon.settings)  # noqa: E731
        self.person(act, may=may, refusal=DropforgeError)
        self._end_cancelled()

    @precondition(lambda self: len(self.world.champions) > 1)
    @rule(to=st.none() | PICK)
    def roll_back(self, to: int | None) -> None:
        """Go back to a former champion."""
        to = None if to is None else to % len(self.world.champions)
        target, generation = self.world.target(to), len(self.world.champions) - 1

        def act() -> None:
            with transaction(self.daemon.engine) as session:
                moved = promotion.champion(session, "default").generation != generation
            if not moved:
                decisions.rollback(self.daemon.engine, self.daemon.root, "default", Word("it swears", self.now), to=to)

        self.person(act, may=target is not None, refusal=DropforgeError)
        if target is not None:
            self.world.roll_back(target)

    # --- what must hold

    @invariant()
    def the_real_one_is_what_the_model_says(self) -> None:
        """Compare rows and folders with the model, and every rule of the house."""
        with transaction(self.daemon.engine) as session:
            drop_rows = session.exec(select(Drop).order_by(col(Drop.id))).all()
            run_rows = session.exec(select(Run).order_by(col(Run.id))).all()
            done = select(Promotion.model_id)
            served = session.exec(done.order_by(col(Promotion.generation))).all()
        assert [(row.name, row.state, row.first_run) for row in drop_rows] == [
            (drop.name, drop.state, drop.first_run) for drop in self.world.drops
        ]
        assert [(row.state, row.failures, row.snapshot) for row in run_rows] == [
            (run.state, run.failures, run.snapshot) for run in self.world.runs
        ]
        assert {row.id for row in run_rows if row.outcome == AWAITING} == self.world.waits
        assert served == [self.models[name] for name in self.world.champions]
        assert sorted(path.name for path in (self.folder / "inbox").glob("*.jsonl")) == sorted(self.inbox)
        assert broken(self.folder) == []


def test_whatever_happens_the_daemon_does_what_the_model_says(
    whole: bool, record_property: Callable[[str, object], None]
) -> None:
    chosen = int(os.environ.get("DROPFORGE_CHAOS_SEED") or (random.SystemRandom().randrange(10**6) if whole else SEED))
    examples, steps = (200, 60) if whole else (12, 60)
    came: Counter[str] = Counter()

    class Counted(House):
        def teardown(self) -> None:
            came.update(f"trouble at {name}" for name in self.seen)
            came.update([drop.state for drop in self.world.drops] + [run.state for run in self.world.runs])
            came.update({"champion": len(self.world.champions) - 1, "blocked": len(self.world.blocked)})
            came.update({"waiting for approval": len(self.world.waits), "stopped run": self.world.stopped})
            came.update(f"suspicion {one.ended or 'open'}" for one in self.world.suspects)
            came["trial"] += sum(run.trial for run in self.world.runs)
            super().teardown()

    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    seeded(chosen)(Counted)
    try:
        run_state_machine_as_test(Counted, settings=profile)
    finally:
        told = ", ".join(f"{name} {count}" for name, count in sorted(came.items()))
        record_property("table", f"model check: seed {chosen}, {examples} histories of up to {steps} steps; {told}")
    wanted = {"accepted", "duplicate", "rejected", "succeeded", "champion", "blocked", "stopped run", "trial"}
    missing = [name for name in (*wanted, "suspicion suspended", "trouble at commit") if not came[name]]
    assert missing == [], "the histories are too tame"
