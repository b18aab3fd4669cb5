"""
What a person may expect of Dropforge, in as few words as it takes: the model that the real one is held to.

It knows no file, no row and no crash: whatever happens to the real one in between, it must come to the same.
"""

from dataclasses import dataclass, field

DAY, NIGHT = 86_400_000, 7_200_000
SETTLE = 5.0
LIMIT, BACKOFF = 3, 30_000
#: A run that is created so much later than now is due: the clock has been set back.
AHEAD = 60_000
TRIALS = 7


@dataclass
class Drop:
    """A file that was taken."""

    name: str
    content: str
    state: str
    first_run: int | None = None
    restored: bool = False


@dataclass
class Run:
    """A run."""

    created: int
    not_before: int
    state: str = "queued"
    snapshot: list[int] | None = None
    retaken: bool = False
    failures: int = 0
    promoted: bool = False
    model: str = ""
    trial: bool = False
    started: int | None = None


@dataclass
class Suspect:
    """A drop that may have made a run worse; `trial` is the run that tries it, 0 before its turn."""

    drop: int
    blamed: int
    trial: int = 0
    ended: str = ""


@dataclass
class World:
    """Drops and runs are numbered from 1, as the real ones are."""

    drops: list[Drop] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    champions: list[str] = field(default_factory=lambda: ["base"])
    blocked: set[str] = field(default_factory=set)
    waits: set[int] = field(default_factory=set)
    nights: set[int] = field(default_factory=set)
    suspects: list[Suspect] = field(default_factory=list)
    made: dict[str, list[int]] = field(default_factory=dict)
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
            if self.unseen:
                self.enqueue(now)

    def claim(self, now: int) -> None:
        """Begin the next run that is due: what waits goes first, and what tries a drop last."""
        if self.running:
            return
        order = sorted(enumerate(self.runs, 1), key=lambda one: (one[1].trial, one[1].state == "queued", one[0]))
        for number, run in order:
            due = run.not_before <= now or run.created > now + AHEAD
            if run.state not in {"waiting", "queued"} or not due:
                continue
            if run.state == "queued" or run.retaken:
                seen = range(1, len(self.drops) + 1) if run.snapshot is None else run.snapshot
                accepted = [place for place in seen if self.free(place, number)]
                if not accepted:
                    self.end(number, "cancelled")
                    continue
                run.snapshot, run.retaken = accepted, False
                for place in accepted if not run.trial else []:
                    self.drops[place - 1].first_run = self.drops[place - 1].first_run or number
            run.state, run.started = "running", run.started or now
            return

    def free(self, place: int, number: int = 0) -> bool:
        """Say whether a drop may be in run `number`: one on trial is in its own alone."""
        elsewhere = any(
            one.drop == place and not one.ended and not (number and one.trial == number) for one in self.suspects
        )
        return self.drops[place - 1].state == "accepted" and not elsewhere

    @property
    def unseen(self) -> list[int]:
        """The drops that wait for a run."""
        places = range(1, len(self.drops) + 1)
        return [place for place in places if self.free(place) and self.drops[place - 1].first_run is None]

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

    def wait(self, number: int, now: int) -> None:
        """End a run with a win that waits."""
        self.judge(number, now, won=True)
        self.waits.add(number)

    def withdraw(self, number: int, now: int) -> None:
        """Take a drop out of later runs: those made from it or queued for it end, one on what else was new begins."""
        self.drops[number - 1].state = "withdrawn"
        made = [
            place
            for place, run in enumerate(self.runs, 1)
            if number in (run.snapshot or []) and (run.state in {"running", "waiting"} or place in self.waits)
        ]
        self.leave(number, "ended", now)
        for place in made:
            self.end(place, "cancelled")
            for one in self.suspects:
                if one.ended and one.trial == place and one.drop != number:
                    self.drops[one.drop - 1].first_run = None
        self.stopped += len(made)
        self.waits.difference_update(made)
        if made and self.unseen:
            self.enqueue(now)
        for place, run in enumerate(self.runs, 1) if not self.unseen else ():
            if run.state == "queued" and not run.trial:
                self.end(place, "cancelled")

    # --- the search for the drop that made a run worse

    @property
    def known(self) -> set[int]:
        """The drops that the champion was trained on."""
        return set(self.made.get(self.champions[-1], []))

    def judge(self, number: int, now: int, *, worse: bool = False, won: bool = False) -> None:
        """
        End a run with a verdict on its candidate: a bad one puts the new drops on trial, or finds one.

        Not where the candidate lacks a drop of the champion's; a trial beside another champion is made again.
        """
        run, known = self.runs[number - 1], self.known
        run.state = "succeeded"
        own = set(run.snapshot or [])
        speaks = worse and bool(known) and known <= own
        if not run.trial:
            tried_before = {one.drop for one in self.suspects if one.trial}
            new = [place for place in own - known if self.free(place) and not self.drops[place - 1].restored]
            new.sort(key=lambda place: (place in tried_before, -place))
            self.suspects += [Suspect(place, number) for place in new if speaks]
            return
        for tried in [one for one in self.suspects if not one.ended and number in {one.trial, self.control(one)}]:
            if not (won and tried.trial == number) and not self.stands(tried):
                self.take_back(tried)
            elif tried.trial != number:
                # Where its candidate is as good as the champion, the trial's was worse than it, too.
                end = "cleared" if worse else "suspended"
                if not worse:
                    self.drops[tried.drop - 1].state = end
                for other in self.suspects:
                    if other.blamed == tried.blamed and not other.ended and other is not tried:
                        other.ended = "cleared"
                self.clear(tried, end, now)
            elif not speaks:
                self.clear(tried, "cleared", now)

    def control(self, suspect: Suspect) -> int:
        """Return the run that was trained without a suspect, to compare its trial with; 0 for none."""
        later = [place for place, run in enumerate(self.runs, 1) if run.trial and place > suspect.trial > 0]
        return later[0] if later else 0

    def stands(self, suspect: Suspect) -> bool:
        """Say whether a trial has the drops that it would be made of now."""
        own = set(self.runs[suspect.trial - 1].snapshot or [])
        return own - self.known == self.tested(suspect) and not any(map(self.free, self.known - own))

    def take_back(self, suspect: Suspect) -> None:
        """Let a trial count no more; it and its control end."""
        for number in (suspect.trial, self.control(suspect)):
            if number and self.runs[number - 1].state in {"waiting", "running"}:
                self.end(number, "cancelled")
        suspect.trial = 0

    def tested(self, suspect: Suspect) -> set[int]:
        """Return what a trial adds to the champion's drops: the suspect, and what its search has cleared."""
        search = [one for one in self.suspects if one.blamed == suspect.blamed and one.ended == "cleared" and one.trial]
        cleared = {one.drop for one in search if self.runs[one.trial - 1].state == "succeeded"}
        return {suspect.drop, *(filter(self.free, cleared - self.known))}

    def clear(self, suspect: Suspect, end: str, now: int) -> None:
        """End the suspicion of a drop; after the last of a search what is left runs, if that is anything new."""
        suspect.ended = end
        search = [one for one in self.suspects if one.blamed == suspect.blamed]
        came = any(
            one.ended in {"suspended", "ended"} or (one.trial and self.runs[one.trial - 1].promoted) for one in search
        )
        if came and all(one.ended for one in search):
            left = [place for place in range(1, len(self.drops) + 1) if self.free(place)]
            new = [self.drops[place - 1] for place in left if place not in self.known]
            for drop in new:
                drop.first_run = None
            if new:
                self.enqueue(now)

    def go_on(self, now: int) -> None:
        """Queue the next trial, or end the search."""
        if any(self.is_tried(one, now) for one in self.suspects if one.trial and not one.ended):
            return
        for one in self.suspects:
            if one.ended:
                continue
            left = [place for place in sorted(self.known) if self.free(place)]
            begun = [run for run in self.runs if run.trial and run.started and now - 7 * DAY < run.started <= now]
            if left and one.drop not in self.known and len(begun) < TRIALS:
                self.try_drops(now, self.tested(one))
                one.trial = len(self.runs)
                return
            self.clear(one, "cleared", now)

    def is_tried(self, suspect: Suspect, now: int) -> bool:
        """Say whether the trial of a suspect or its control goes on; begin the control, or end what is over."""
        trial = run = self.runs[suspect.trial - 1]
        if trial.state == "succeeded":
            if not self.stands(suspect):
                self.take_back(suspect)
                return False
            if not self.control(suspect):
                self.try_drops(now, set())
            run = self.runs[self.control(suspect) - 1]
        if trial.started is None:
            trial.snapshot = sorted({*filter(self.free, self.known), *self.tested(suspect)})
        if run.state in {"waiting", "running"}:
            return True
        if run is not trial:
            self.take_back(suspect)
        self.clear(suspect, "cleared", now)
        return False

    def try_drops(self, now: int, tested: set[int]) -> None:
        """Queue a run on the champion's drops and these."""
        snapshot = sorted({*filter(self.free, self.known), *tested})
        self.runs.append(Run(now, now, state="waiting", snapshot=snapshot, retaken=True, trial=True))

    def leave(self, number: int, end: str, now: int) -> None:
        """End the suspicion of a drop that a person decided on; cancel its trial and repeat that of a later drop."""
        opened = [one for one in self.suspects if not one.ended]
        counted = self.drops[number - 1].state == "accepted" and any(one.drop == number for one in opened)
        for one in opened:
            if one.drop == number:
                self.take_back(one)
                self.clear(one, end, now)
            elif one.trial and not counted and number <= max(self.runs[one.trial - 1].snapshot or []):
                self.take_back(one)

    # --- people

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
        others = [other for other in self.drops if other is not drop and other.state == "accepted"]
        twin = any(other.content == drop.content for other in others)
        tried = any(one.drop == number and not one.ended for one in self.suspects)
        if (drop.state not in {"withdrawn", "suspended"} and not tried) or twin:
            return False
        drop.state, drop.first_run, drop.restored = "accepted", None, True
        self.leave(number, "cleared", now)
        self.enqueue(now)
        return True

    def promote(self, number: int, model: str) -> bool:
        """Let a run's model serve, once; say whether it may."""
        run = self.runs[number - 1]
        if not run.promoted:
            if model in self.blocked:
                return False
            self._serve(model, number)
            run.promoted = True
        return True

    def force(self, number: int) -> bool:
        """Let the model of a run that is over serve, whatever became of it; say whether it may."""
        run = self.runs[number - 1]
        over = run.state in {"succeeded", "failed", "cancelled"}
        if not over or not run.model or run.model == self.champions[-1]:
            return False
        self._serve(run.model, number)
        return True

    def _serve(self, model: str, number: int) -> None:
        self.champions.append(model)
        self.made[model] = list(self.runs[number - 1].snapshot or [])
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
