"""
What a person may expect of Dropforge, in as few words as it takes: the model that the real one is held to.

It knows no file, no row and no crash: whatever happens to the real one in between, it must come to the same.
"""

from dataclasses import dataclass, field

DAY, NIGHT = 86_400_000, 7_200_000
SETTLE = 5.0
LIMIT, BACKOFF = 3, 30_000


@dataclass
class Drop:
    """A file that was taken."""

    name: str
    content: str
    state: str
    first_run: int | None = None


@dataclass
class Run:
    """A run; `beat` is when its owner was last heard of."""

    created: int
    not_before: int
    state: str = "queued"
    snapshot: list[int] | None = None
    retaken: bool = False
    failures: int = 0
    beat: int | None = None
    promoted: bool = False
    model: str = ""
    judged: int = 0


@dataclass
class World:
    """Drops and runs are numbered from 1, as the real ones are."""

    drops: list[Drop] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    champions: list[str] = field(default_factory=lambda: ["base"])
    blocked: set[str] = field(default_factory=set)
    waits: set[int] = field(default_factory=set)
    nights: set[int] = field(default_factory=set)
    restored: dict[int, int] = field(default_factory=dict)
    moments: int = 0
    since: int = 0
    stopped: int = 0
    looked: int | None = None

    def take(self, name: str, content: str, now: int) -> None:
        """Take a file in."""
        known = {drop.content for drop in self.drops if drop.state in {"accepted", "withdrawn", "suspended"}}
        state = "rejected" if content.startswith("bad") else "duplicate" if content in known else "accepted"
        self.drops.append(Drop(name, content, state))
        if state == "accepted":
            self.enqueue(now)

    def enqueue(self, now: int) -> None:
        """Open a run or put the open one off."""
        opened = next((run for run in self.runs if run.state == "queued"), None)
        if opened is None:
            self.runs.append(Run(now, now))
        else:
            opened.not_before = max(opened.not_before, now)

    def night(self, now: int) -> None:
        """Queue a run for the latest night that has passed since the last one, if there is anything new."""
        if self.looked is None or now < self.looked:
            self.since = now
        self.looked = now
        due = (now - NIGHT) // DAY * DAY + NIGHT
        if due > max([self.since, *(night for night in self.nights if night <= now)]):
            self.nights.add(due)
            if any(drop.state == "accepted" and drop.first_run is None for drop in self.drops):
                self.enqueue(now)

    def claim(self, now: int) -> None:
        """Begin the next run that is due: what waits goes first."""
        if self.running:
            return
        for state in ("waiting", "queued"):
            for number, run in enumerate(self.runs, 1):
                if run.state != state or not (run.not_before <= now or run.created > now or (run.beat or 0) > now):
                    continue
                if state == "queued" or run.retaken:
                    seen = range(1, len(self.drops) + 1) if run.snapshot is None else run.snapshot
                    accepted = [place for place in seen if self.drops[place - 1].state == "accepted"]
                    if not accepted:
                        self.end(number, "cancelled")
                        continue
                    run.snapshot, run.retaken = accepted, False
                    for place in accepted:
                        self.drops[place - 1].first_run = self.drops[place - 1].first_run or number
                run.state, run.beat = "running", now
                return

    @property
    def running(self) -> int:
        """The number of the run that is in hand; 0 for none."""
        return next((number for number, run in enumerate(self.runs, 1) if run.state == "running"), 0)

    def fail(self, number: int, now: int, *, retryable: bool) -> None:
        """Count a failure."""
        run = self.runs[number - 1]
        run.failures += 1
        if not retryable or run.failures >= LIMIT:
            self.end(number, "failed")
        else:
            run.state, run.not_before = "waiting", now + (BACKOFF << (run.failures - 1))

    def end(self, number: int, state: str) -> None:
        """End a run without a verdict: what was new in it waits for a run again."""
        self.runs[number - 1].state = state
        for drop in self.drops:
            drop.first_run = None if drop.first_run == number else drop.first_run

    def judge(self, number: int) -> None:
        """End a run with a verdict on its candidate, and so on the drops in it."""
        self.moments += 1
        self.runs[number - 1].state, self.runs[number - 1].judged = "succeeded", self.moments

    def new_in(self, number: int) -> list[int]:
        """Return what no other candidate was judged with since it came, or came back."""
        others = [run for place, run in enumerate(self.runs, 1) if place != number and run.judged]
        return [
            place for place in self.runs[number - 1].snapshot or []
            if not any(place in (run.snapshot or []) and run.judged > self.restored.get(place, 0) for run in others)
        ]  # fmt: skip

    def wait(self, number: int) -> None:
        """End a run with a win that waits."""
        self.judge(number)
        self.waits.add(number)

    def withdraw(self, number: int, now: int) -> None:
        """Take a drop out of later runs: those that were made from it end, and one on what else was new begins."""
        self.drops[number - 1].state = "withdrawn"
        made = [
            place for place, run in enumerate(self.runs, 1)
            if number in (run.snapshot or []) and (run.state in {"running", "waiting"} or place in self.waits)
        ]  # fmt: skip
        for place in made:
            self.end(place, "cancelled")
            self.runs[place - 1].judged = 0
        self.stopped += len(made)
        self.waits.difference_update(made)
        if made and any(drop.state == "accepted" and drop.first_run is None for drop in self.drops):
            self.enqueue(now)

    def hold(self, number: int) -> None:
        """Hold back what no other candidate was judged with since it came, or came back."""
        for place in self.new_in(number):
            if self.drops[place - 1].state == "accepted":
                self.drops[place - 1].state = "suspended"

    def retry(self, number: int, now: int) -> bool:
        """Let a run go on; say whether it may."""
        run = self.runs[number - 1]
        opened = any(other.state == "queued" for other in self.runs)
        if run.state not in {"failed", "cancelled"} or (run.snapshot is None and opened):
            return False
        run.state = "queued" if run.snapshot is None else "waiting"
        run.retaken = run.snapshot is not None
        run.failures, run.not_before = 0, now
        return True

    def restore(self, number: int, now: int) -> bool:
        """Put a drop back; say whether it may."""
        drop = self.drops[number - 1]
        twin = any(other.content == drop.content and other.state == "accepted" for other in self.drops)
        if drop.state not in {"withdrawn", "suspended"} or twin:
            return False
        drop.state, drop.first_run = "accepted", None
        self.moments += 1
        self.restored[number] = self.moments
        self.enqueue(now)
        return True

    def promote(self, number: int, model: str) -> bool:
        """Let a run's model serve, once; say whether it may."""
        run = self.runs[number - 1]
        if not run.promoted:
            if model in self.blocked:
                return False
            self._serve(model)
            run.promoted = True
        return True

    def force(self, number: int) -> bool:
        """Let the model of a run that is over serve, whatever became of it; say whether it may."""
        run = self.runs[number - 1]
        over = run.state in {"succeeded", "failed", "cancelled"}
        if not over or not run.model or run.model == self.champions[-1]:
            return False
        self._serve(run.model)
        return True

    def _serve(self, model: str) -> None:
        self.champions.append(model)
        self.blocked.discard(model)
        self.waits.clear()

    def target(self, to: int | None) -> str | None:
        """Return the model that a rollback leads to."""
        serving = self.champions[-1]
        if to is not None:
            found = self.champions[to] if to < len(self.champions) else serving
            return None if found == serving else found
        before = next((one for one in reversed(self.champions) if one != serving), None)
        return None if before in self.blocked else before

    def roll_back(self, model: str) -> None:
        """Let a former champion serve, and bar the one that loses its place."""
        self.blocked.add(self.champions[-1])
        self.blocked.discard(model)
        self.champions.append(model)
        self.waits.clear()
