"""The scheduled digest: counts of events per track since the previous digest; none if nothing happened."""

from collections import Counter
from collections.abc import Iterable
from zoneinfo import ZoneInfo

from sqlmodel import Session, col, select

from daemon.messages.texts import Text, inert
from daemon.queue.nightly import last_due
from daemon.settings.model import Settings
from daemon.state.clauses import verdict_clauses
from daemon.state.states import AWAITING
from daemon.state.tables import Event, Run
from daemon.system.clock import utc
from pipeline.decide.explain import sentence
from pipeline.words import count

#: The event kinds that are counted, each with singular and plural ("": regular), in the order of the digest.
_COUNTED = {
    "promoted": ("promotion", ""),
    "forced": ("forced promotion", ""),
    "rolled_back": ("rollback", ""),
    "champion_doubted": ("champion in doubt", "champions in doubt"),
    "return_proposed": ("proposed return", ""),
    "base_changed": ("change of the base model", "changes of the base model"),
    "run_succeeded": ("verdict", ""),
    "run_failed": ("failed run", ""),
    "run_crashed": ("crashed run", ""),
    "run_cancelled": ("cancelled run", ""),
    "run_blocked": ("run that could not go on", "runs that could not go on"),
    "run_began_again": ("run that began again from another champion", "runs that began again from another champion"),
    "run_overtaken": ("win that another champion came before", "wins that another champion came before"),
    "drop_accepted": ("accepted drop", ""),
    "drop_proposed": ("proposed held-out file", ""),
    "drop_duplicate": ("duplicate drop", ""),
    "answers_proposed": ("drop with new answers to old questions", "drops with new answers to old questions"),
    "drop_rejected": ("rejected drop", ""),
    "drop_suspected": ("drop put on trial", "drops put on trial"),
    "drop_suspended": ("suspended drop", ""),
    "drop_withdrawn": ("withdrawn drop", ""),
    "drop_restored": ("restored drop", ""),
    "hook_failed": ("failed hook", ""),
    "health_failed": ("failed health command", ""),
    "rollback_failed": ("rollback that failed", "rollbacks that failed"),
    "disk_low": ("time of low disk", "times of low disk"),
}
#: Most verdicts that are listed one by one.
_MOST_VERDICTS = 4


def digest_due(settings: Settings, last: int, now: int) -> int | None:
    """Return the digest schedule's latest time in (`last`, `now`], all in ms since the epoch; `None` without one."""
    schedule = settings.messages.schedule
    if not schedule:
        return None
    due = last_due(schedule, settings.timezone, utc(last), utc(now))
    return None if due is None else round(due.timestamp() * 1000)


def digest_text(session: Session, settings: Settings, after: int, last: int) -> Text | None:
    """Return the digest of `_COUNTED` events with ids above `after`; `None` without any. `last`: its start in ms."""
    wanted = select(Event).where(col(Event.id) > after, col(Event.kind).in_(_COUNTED)).order_by(col(Event.id))
    events = session.exec(wanted).all()
    if not events:
        return None
    lines = []
    for track in dict.fromkeys(event.track for event in events):
        numbers = Counter(event.kind for event in events if event.track == track)
        counts = (count(numbers[kind], *words) for kind, words in _COUNTED.items() if numbers[kind])
        lines.append(f"{track or 'all tracks'}: {', '.join(counts)}")
    lines += _verdicts(session, events)
    since = utc(last).astimezone(ZoneInfo(settings.timezone))
    title = f"[dropforge] digest since {since:%Y-%m-%d %H:%M} {settings.timezone}"
    return Text("digest", "info", title, "\n".join([*lines, "more: dropforge status"]))


def _verdicts(session: Session, events: Iterable[Event]) -> list[str]:
    """
    Return a line for each of the last four verdicts that promoted nothing, and a line that counts the earlier ones.

    A win that waits for approval has no line.
    """
    ended = [
        event.run_id for event in events if event.kind == "run_succeeded" and event.detail["outcome"] != "promoted"
    ]
    runs = [session.get_one(Run, run_id) for run_id in ended[-_MOST_VERDICTS:]]
    lines = [f"run {run.id}: {inert(sentence(verdict_clauses(run)))}" for run in runs if run.outcome != AWAITING]
    more = len(ended) - len(runs)
    return [*lines, f"and {count(more, 'further verdict')}: dropforge runs"] if more else lines
