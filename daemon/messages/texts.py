"""
Messages that are sent at once: a function for each kind of event; other events are in the digest.

A message says what happened, why, and the command that undoes it or shows more. It has at most twelve lines, no row of
data, and foreign text only after `inert`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from sqlmodel import Session, select

from daemon.champions.history import blocker
from daemon.champions.promotion import champions_of
from daemon.settings.model import Settings
from daemon.state.clauses import change_clauses, drop_clauses, preview_clauses, verdict_clauses, watch_clauses
from daemon.state.states import AWAITING
from daemon.state.tables import Drop, Event, Promotion, Run
from pipeline.data_words import proposed_words
from pipeline.decide.explain import sentence
from pipeline.decide.watch import Watch
from pipeline.errors import EXIT_UNFORESEEN
from pipeline.words import count, printable, size_words

#: Characters that make links, mentions, emphasis or markup somewhere, and similar ones that do not.
_LOOKALIKES = str.maketrans("<>@*`[]|~#\\&", "‹›＠∗ˋ［］¦∼＃＼＆")  # noqa: RUF001 - they are to look alike
_DOTTED = re.compile(r"[\w-]+(?:\.[\w-]+)+")
#: Not a top-level domain: suffixes of files, and words with a digit or an underscore.
_NO_HOST = re.compile(r"jsonl?|toml|txt|csv|tsv|log|html|parquet|gz|\w*[\d_]\w*", re.IGNORECASE)
#: Widths of a name in a title, of other foreign text, and of a clause about a suspension, which may have a command.
_TITLE_WIDTH, _WIDTH, _CLAUSE_WIDTH = 60, 160, 300


class Text(NamedTuple):
    """The content of one message, the same for every address."""

    kind: str
    level: str
    """Severity in Apprise's words: info, success, warning, failure."""
    title: str
    body: str


def text_of(session: Session, event: Event) -> Text | None:
    """Return the message to send now for an event; `None` if none, as for a verdict that awaits no approval."""
    word = _AT_ONCE.get(event.kind)
    return None if word is None else word(session, event)


def _text(event: Event, level: str, title: str, *lines: str) -> Text:
    return Text(event.kind, level, f"[dropforge] {title}", "\n".join(filter(None, lines)))


#: Level and first word of a message about a change of champion, by the event's kind.
_CHANGES = {
    "promoted": ("success", "PROMOTED"),
    "forced": ("warning", "FORCED"),
    "rolled_back": ("failure", "ROLLED BACK"),
}


def _changed(session: Session, event: Event) -> Text:
    of_track = select(Promotion).where(Promotion.track == event.track)
    change = session.exec(of_track.where(Promotion.generation == event.detail["generation"])).one()
    why = change_clauses(change)
    level, title = _CHANGES[event.kind]
    see = f"the evidence: dropforge report {change.run_id}"
    undo = f"to go back to the model before: dropforge rollback --track {event.track} --reason TEXT"
    if event.kind == "rolled_back":
        level = "warning" if change.approved_by else "failure"
        see, undo = "", f"what serves now, and what did: dropforge history --track {event.track}"
    title = f"{title}: {event.track}, generation {change.generation}"
    whose = "" if change.run_id is None else f"it is the model of run {change.run_id}"
    return _text(event, level, title, *map(inert, (sentence(why[:2]), *why[2:])), whose, see, undo)


def _awaits(session: Session, event: Event) -> Text | None:
    run = session.get_one(Run, event.run_id)
    # No message if the win was approved or rejected in the meantime.
    if event.detail.get("outcome") != AWAITING or run.outcome != AWAITING:
        return None
    against = blocker(run, champions_of(session, run.track))
    clauses = verdict_clauses(run, against)
    yes = f"to take it: dropforge promote {run.id}" if against is None else ""
    evidence = f"the evidence: dropforge report {run.id}"
    lines = map(inert, (sentence(clauses[:2]), *clauses[2:]))
    return _text(event, "warning", f"WAITS FOR APPROVAL: {run.track}, run {run.id}", *lines, evidence, yes)


def _ended_badly(session: Session, event: Event) -> Text:
    run = session.get_one(Run, event.run_id)
    where = f"at step {run.step}" if run.step else "before its first step"
    failures = count(max(run.failures, 1), "failure")
    title, how = "FAILED", f"it was given up {where}, after {failures}, interruptions not counted"
    if event.kind == "run_crashed":
        title, how = "CRASHED", f"{where} its processes vanished again and again"
    return _text(
        event,
        "failure",
        f"{title}: {run.track}, run {run.id}",
        how,
        f"the last error: {_error(event)}",
        f"more: dropforge show {run.id}, dropforge logs {run.id}",
        f"to go on where it stopped: dropforge retry {run.id}",
    )


#: Kind of event → title, command that failed, consequence, and what to do.
_SERVER_TROUBLE = {
    "hook_failed": (
        "HOOK FAILED",
        "hooks.after_promotion",
        "the new champion stands, but the server may not know of it",
        "what it said: dropforge history --track {track}",
        "to run it again: dropforge hook --track {track}",
    ),
    "health_failed": (
        "UNHEALTHY",
        "hooks.health",
        "the former champion is being brought back",
        "what comes of it: dropforge history --track {track}",
    ),
    "rollback_failed": (
        "NOT ROLLED BACK",
        "hooks.health",
        "the unhealthy model still serves; what may take its place: dropforge history --track {track}",
        "to let it: dropforge rollback --track {track} --to GENERATION --reason TEXT",
    ),
}


def _server_trouble(_session: Session, event: Event) -> Text:
    title, command, *lines = _SERVER_TROUBLE[event.kind]
    worded = (line.format(track=event.track) for line in lines)
    return _text(event, "failure", f"{title}: {event.track}", f"{command}: {_error(event)}", *worded)


def _disk_low(_session: Session, event: Event) -> Text:
    return _text(
        event,
        "failure",
        f"LOW DISK: {size_words(event.detail['free_bytes'])} free",
        "no run begins, and files stay in the inbox, until there is room",
        "what can be given back: dropforge gc --dry-run",
    )


def _rejected(session: Session, event: Event) -> Text:
    drop = session.get_one(Drop, event.drop_id)
    rules = ", ".join(f"{number} {inert(rule)}" for rule, number in event.detail["rules"].items())
    owner = f", dropped by {inert(drop.owner)}" if drop.owner else ""
    first, *_ = event.detail["kinds"]
    where, remedy = f"line {first['line']}: " if first["line"] else "", first["remedy"]
    return _text(
        event,
        "warning",
        f"REJECTED: {drop.track}, {inert(drop.name, _TITLE_WIDTH)}",
        f"the file: {inert(drop.name)}, drop {drop.id}{owner}",
        f"{count(drop.findings, 'finding')} in {count(drop.rows, 'row')} ({rules})",
        f"{where}{inert(first['bare'])}",
        # A command that `inert` changes, one with a pipe say, would not work.
        f"what to do: {remedy}" if inert(remedy) == remedy else "",
        "each with its line and what to do: beside the file, in rejected/",
    )


def _suspended(session: Session, event: Event) -> Text:
    drop = session.get_one(Drop, event.drop_id)
    return _text(
        event,
        "warning",
        f"SUSPENDED: {drop.track}, {inert(drop.name, _TITLE_WIDTH)}",
        *_about(drop),
        *(inert(clause, _CLAUSE_WIDTH) for clause in drop_clauses(drop)),
        f"to train on it all the same: dropforge drops restore {drop.id} --reason TEXT",
    )


def _new_answers(session: Session, event: Event) -> Text:
    drop = session.get_one(Drop, event.drop_id)
    return _text(
        event,
        "warning",
        f"NEW ANSWERS: {drop.track}, {inert(drop.name, _TITLE_WIDTH)}",
        *_about(drop),
        f"{proposed_words(event.detail['rows'])}: they are not used, the old ones are",
        "both side by side: in the note beside the file, and on the drop's page",
        f"to let the new ones count: dropforge drops accept {drop.id} --answers",
    )


def _unlike_champion(session: Session, event: Event) -> Text | None:
    drop = session.get_one(Drop, event.drop_id)
    if not preview_clauses(drop)[1:]:
        return None
    return _text(
        event,
        "warning",
        f"LOW AGREEMENT: {drop.track}, {inert(drop.name, _TITLE_WIDTH)}",
        *_about(drop),
        f"it is used all the same; to take it out: dropforge drops withdraw {drop.id} --reason TEXT",
    )


def _about(drop: Drop) -> list[str]:
    """Return the lines on a drop's file, and on how well the champion's answers agree with it."""
    return [f"the file: {inert(drop.name)}, drop {drop.id}", *map(inert, preview_clauses(drop))]


def _on_watch(_session: Session, event: Event) -> Text:
    title = f"{'IN DOUBT' if event.kind == 'champion_doubted' else 'RETURN PROPOSED'}: {event.track}"
    clauses = watch_clauses(str(event.track), Watch.model_validate(event.detail["watch"]))
    return _text(event, "warning", title, *clauses, f"all champions: dropforge history --track {event.track}")


_AT_ONCE: dict[str, Callable[[Session, Event], Text | None]] = {
    **dict.fromkeys(_CHANGES, _changed),
    "run_succeeded": _awaits,
    "trial_settled": _awaits,
    "run_failed": _ended_badly,
    "run_crashed": _ended_badly,
    "hook_failed": _server_trouble,
    "health_failed": _server_trouble,
    "rollback_failed": _server_trouble,
    "disk_low": _disk_low,
    "drop_rejected": _rejected,
    "drop_suspended": _suspended,
    "answers_proposed": _new_answers,
    "drop_previewed": _unlike_champion,
    **dict.fromkeys(("champion_doubted", "return_proposed"), _on_watch),
}


def _error(event: Event) -> str:
    """Return an event's error on one line; a fixed phrase for an unforeseen exception, whose text may quote data."""
    foreseen = event.detail.get("exit_code") != EXIT_UNFORESEEN
    return inert(event.detail.get("error") or "not said") if foreseen else "an unforeseen exception"


def inert(text: str, width: int = _WIDTH) -> str:
    """Return `text` on one line, cut to about `width` characters, with markup, mentions and links disabled."""
    seen = printable(text)
    clipped = seen if len(seen) <= width else f"{seen[: width - 1]}…"
    return _DOTTED.sub(_no_link, clipped.translate(_LOOKALIKES).replace("://", "∶∕∕"))  # noqa: RUF001


def _no_link(match: re.Match[str]) -> str:
    """Return a matched file name or setting unchanged; of anything else put the dots in brackets: no host name."""
    section, _, name = match[0].partition(".")
    field = Settings.model_fields.get(section)
    is_setting = field is not None and name in getattr(field.annotation, "model_fields", {})
    return match[0] if is_setting or _NO_HOST.fullmatch(match[0].rpartition(".")[2]) else match[0].replace(".", "(.)")
