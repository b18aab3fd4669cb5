"""
Messages that are sent at once: a function for each kind of event; other events are in the digest.

A message says what happened, why, and the command that undoes it or shows more. It has at most twelve lines, no row of
data, and foreign text only after `inert`.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sqlmodel import Session

from daemon.champions.history import blocker, true_sentence
from daemon.champions.promotion import champions_of
from daemon.messages.inert import inert
from daemon.state.run_files import run_folder
from daemon.state.states import AWAITING
from daemon.state.tables import Drop, Event, Run
from daemon.system.folders import WorkFolder
from pipeline.records.fast_path import KEYS
from pipeline.words import count, size_words

#: The beginning of the text of an unexpected exception, whose rest may quote data.
_UNFORESEEN = re.compile(r"([A-Za-z_][\w.]*(?:Error|Exception|Warning|Exit|Interrupt)): ")
_WON = "promoted: "
#: A quoted key or value.
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
#: Widths of a name in a title, and of a part of a suspension's reason, which may have two commands.
_TITLE_WIDTH, _PART_WIDTH = 60, 300


class Text(NamedTuple):
    """The content of one message, the same for every address."""

    kind: str
    level: str
    """Severity in Apprise's words: info, success, warning, failure."""
    title: str
    body: str


def text_of(session: Session, work_folder: WorkFolder, event: Event) -> Text | None:
    """Return the message to send now for an event; `None` if its kind has none or a verdict awaits no approval."""
    tell = _AT_ONCE.get(event.kind)
    return None if tell is None else tell(session, work_folder, event)


def _text(event: Event, level: str, title: str, *lines: str) -> Text:
    return Text(event.kind, level, f"[dropforge] {title}", "\n".join(filter(None, lines)))


def _promoted(_session: Session, _root: WorkFolder, event: Event) -> Text:
    by = _by(event, "approved")
    gain, *warning = _said(event, "reason").removeprefix(_WON).split("; ", 1)
    return _text(
        event,
        "success",
        f"PROMOTED: {event.track}, generation {event.detail.get('generation')}",
        "; ".join([f"{gain}, over the champion before", *warning]),
        f"it is the model of run {event.run_id}{by}",
        f"the evidence: dropforge report {event.run_id}",
        f"to go back to the model before: dropforge rollback --track {event.track} --reason TEXT",
    )


def _forced(_session: Session, _root: WorkFolder, event: Event) -> Text:
    return _text(
        event,
        "warning",
        f"FORCED: {event.track}, generation {event.detail.get('generation')}",
        f"the model of run {event.run_id} is the champion, whatever its verdict{_by(event, 'forced')}",
        f"the reason: {_said(event, 'reason')}",
        f"to go back to the model before: dropforge rollback --track {event.track} --reason TEXT",
    )


def _rolled_back(_session: Session, _root: WorkFolder, event: Event) -> Text:
    return _text(
        event,
        "failure" if event.detail.get("by") is None else "warning",
        f"ROLLED BACK: {event.track}, generation {event.detail.get('generation')}",
        f"{_said(event, 'reason')}{_by(event, 'asked for')}",
        f"what serves now, and what did: dropforge history --track {event.track}",
    )


def _awaits(session: Session, root: WorkFolder, event: Event) -> Text | None:
    run = session.get_one(Run, event.run_id)
    # No message if the win was approved or rejected in the meantime.
    if event.detail.get("outcome") != AWAITING or run.outcome != AWAITING:
        return None
    against = blocker(run_folder(root, run.id or 0), champions_of(session, run.track))
    said = true_sentence(run.id or 0, AWAITING, (run.sentence or "").removeprefix(_WON), against)
    yes = f"to take it: dropforge promote {run.id}" if against is None else ""
    evidence = f"the evidence: dropforge report {run.id}"
    parts = map(inert, said.split("; "))
    return _text(event, "warning", f"WAITS FOR APPROVAL: {run.track}, run {run.id}", *parts, evidence, yes)


def _ended_badly(session: Session, _root: WorkFolder, event: Event) -> Text:
    run = session.get_one(Run, event.run_id)
    crashed = event.kind == "run_crashed"
    how = (
        "its processes vanished again and again" if crashed else f"{count(max(run.failures, 1), 'failure')} of its own"
    )
    return _text(
        event,
        "failure",
        f"{'CRASHED' if crashed else 'FAILED'}: {run.track}, run {run.id}",
        f"it was given up at step {run.step}, after {how}" if not crashed else f"at step {run.step} {how}",
        f"the last error: {_cause(event)}",
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


def _server_trouble(_session: Session, _root: WorkFolder, event: Event) -> Text:
    title, command, *lines = _SERVER_TROUBLE[event.kind]
    told = (line.format(track=event.track) for line in lines)
    return _text(event, "failure", f"{title}: {event.track}", f"{command}: {_said(event, 'error')}", *told)


def _disk_low(_session: Session, _root: WorkFolder, event: Event) -> Text:
    free = event.detail.get("free_bytes")
    left = size_words(free) if isinstance(free, int) else "too little"
    return _text(
        event,
        "failure",
        f"LOW DISK: {left} free",
        "no run begins, and files stay in the inbox, until there is room",
        "what can be given back: dropforge gc --dry-run",
    )


def _rejected(session: Session, _root: WorkFolder, event: Event) -> Text:
    drop = session.get_one(Drop, event.drop_id)
    rules = event.detail.get("rules")
    kinds = [f"{number} {inert(rule)}" for rule, number in rules.items()] if isinstance(rules, Mapping) else []
    found = f"{count(drop.findings, 'finding')} in {count(drop.rows, 'row')}"
    owner = f", dropped by {inert(drop.owner)}" if drop.owner else ""
    where, wrong, remedy = _first_finding(event)
    return _text(
        event,
        "warning",
        f"REJECTED: {drop.track}, {inert(drop.name, _TITLE_WIDTH)}",
        f"the file: {inert(drop.name)}, drop {drop.id}{owner}",
        found + (f" ({', '.join(kinds)})" if kinds else ""),
        f"{where}{wrong}",
        # A command that `inert` changes, one with a pipe say, would not work.
        f"what to do: {remedy}" if remedy and inert(remedy) == remedy else "",
        "each with its line and what to do: beside the file, in rejected/",
    )


def _first_finding(event: Event) -> tuple[str, str, str]:
    """Return line, message and remedy of a rejected drop's first finding, with quoted values replaced by "…"."""
    noted = event.detail.get("kinds")
    first = noted[0] if isinstance(noted, list) and noted and isinstance(noted[0], Mapping) else {}
    wrong, remedy = (
        _QUOTED.sub(lambda quoted: quoted[0] if quoted[1] in KEYS else '"…"', str(first.get(name) or ""))
        for name in ("message", "remedy")
    )
    return f"line {first['line']}: " if first.get("line") else "", inert(wrong), remedy


def _suspended(session: Session, _root: WorkFolder, event: Event) -> Text:
    drop = session.get_one(Drop, event.drop_id)
    return _text(
        event,
        "warning",
        f"SUSPENDED: {drop.track}, {inert(drop.name, _TITLE_WIDTH)}",
        f"the file: {inert(drop.name)}, drop {drop.id}",
        *(inert(part, _PART_WIDTH) for part in f"the reason: {event.detail.get('reason') or 'not said'}".split("; ")),
        f"to train on it all the same: dropforge drops restore {drop.id} --reason TEXT",
    )


_AT_ONCE: dict[str, Callable[[Session, WorkFolder, Event], Text | None]] = {
    "promoted": _promoted,
    "forced": _forced,
    "rolled_back": _rolled_back,
    "run_succeeded": _awaits,
    "run_failed": _ended_badly,
    "run_crashed": _ended_badly,
    "hook_failed": _server_trouble,
    "health_failed": _server_trouble,
    "rollback_failed": _server_trouble,
    "disk_low": _disk_low,
    "drop_rejected": _rejected,
    "drop_suspended": _suspended,
}


def _said(event: Event, name: str) -> str:
    return inert(str(event.detail.get(name) or "not said"))


def _by(event: Event, verb: str) -> str:
    return f", {verb} by {inert(str(event.detail['by']))}" if event.detail.get("by") else ""


def _cause(event: Event) -> str:
    """Return a run's error; of an unexpected exception only its type, as the text may quote data."""
    words = str(event.detail.get("error") or "not said")
    unforeseen = _UNFORESEEN.match(words)
    return inert(unforeseen[1] if unforeseen else words)
