"""What must hold of a workspace at any moment at which no daemon works on it and the last one's successor recovered."""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from daemon.inbox.answers.verdict_notes import VERDICT
from daemon.queue.states import ALLOWED
from daemon.state.layout import DATABASE_NAME
from daemon.state.states import RunState
from pipeline.contract import REVOKED_NAME
from pipeline.models.manifest import model_id, verify_manifest

#: Where each event takes its run; one that is not named leaves it.
_MOVES = {
    "run_claimed": "running",
    "run_adopted": "running",
    "run_succeeded": "succeeded",
    "run_failed": "failed",
    "run_waits": "waiting",
    "run_interrupted": "waiting",
    "run_died": "waiting",
    "run_cancelled": "cancelled",
    "run_postponed": "waiting",
    "run_crashed": "crashed",
}
_DOCUMENTS = {"done": ".receipt.json", "rejected": ".errors.json"}


def broken(folder: Path) -> list[str]:
    """Return what does not hold of the workspace `folder`, in words; nothing if all is well."""
    state = folder / ".dropforge"
    with closing(sqlite3.connect(state / DATABASE_NAME)) as connection:
        connection.row_factory = sqlite3.Row
        rows = _Rows(connection)
        return [
            *_database(connection),
            *_drops(folder, rows),
            *_store(state, rows),
            *_runs(rows),
            *_attempts(state, rows),
            *_champions(state, rows),
            *_leftovers(folder),
        ]


def unnamed(folder: Path) -> list[str]:
    """Return the champions' links that lead to no model of a run and to no base; that may not be at any moment."""
    state = folder / ".dropforge"
    merged = [json.loads(path.read_text())["model_id"] for path in state.glob("runs/*/merge.json")]
    known = {(folder / "base").resolve(), *((state / "models" / name).resolve() for name in merged)}
    links = (state / "tracks").glob("*/champion")
    return [f"{link} leads to {link.readlink()}, which nobody made" for link in links if link.resolve() not in known]


class _Rows:
    """Every table as a list of dicts, in the order of their numbers."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        def read(table: str) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid')]

        self.drops, self.runs, self.attempts = read("drop"), read("run"), read("attempt")
        self.promotions, self.tracks, self.events, self.slots, self.suspects = (
            read("promotion"),
            read("track"),
            read("event"),
            read("slot"),
            read("suspect"),
        )


def _database(connection: sqlite3.Connection) -> Iterator[str]:
    for pragma in ("integrity_check", "foreign_key_check"):
        found = [tuple(row) for row in connection.execute(f"PRAGMA {pragma}")]
        if found not in ([], [("ok",)]):
            yield f"{pragma}: {found}"


def _drops(folder: Path, rows: _Rows) -> Iterator[str]:
    """Each row has one file with one document that tells of it, or a file that still is in the inbox."""
    inbox = folder / "inbox"
    filed: Counter[int] = Counter()
    known = {drop["id"]: drop for drop in rows.drops}
    for place, ending in _DOCUMENTS.items():
        names = {path.name for path in _files(inbox / place)}
        yield from _notes(inbox / place, ending)
        documents = {name for name in names if name.endswith(tuple(_DOCUMENTS.values()))}
        for name in names - documents:
            if name + ending not in documents:
                yield f"inbox/{place}/{name} has no {ending}"
                continue
            document = json.loads((inbox / place / (name + ending)).read_text())
            drop = known.get(document["drop"])
            filed[document["drop"]] += 1
            if drop is None or drop["sha256"] not in {"", _sha256(inbox / place / name)}:
                yield f"inbox/{place}/{name} is not drop {document['drop']}"
            elif (drop["state"] == "rejected") != (place == "rejected"):
                yield f"inbox/{place}/{name} is drop {drop['id']}, which is {drop['state']}"
        for name in documents:
            if name.removesuffix(ending) not in names and not _waits(
                inbox, known, json.loads((inbox / place / name).read_text())
            ):
                yield f"inbox/{place}/{name} tells of a file that is not there"
    for number, drop in known.items():
        waits = (inbox / drop["name"]).exists()
        if filed[number] != 1 and not (filed[number] == 0 and waits):
            yield f"drop {number} ({drop['state']}) lies in {filed[number]} places of done and rejected"


def _files(folder: Path) -> Iterator[Path]:
    """Yield what was filed away there, with its documents, and not what became of it."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(VERDICT):
            yield path


def _notes(folder: Path, ending: str) -> Iterator[str]:
    for path in folder.rglob(f"*{VERDICT}"):
        if not path.with_name(path.name.removesuffix(VERDICT) + ending).exists():
            yield f"{path} tells of a drop without {ending}"


def _waits(inbox: Path, known: dict[int, dict[str, Any]], document: dict[str, Any]) -> bool:
    drop = known.get(document["drop"])
    return drop is not None and (inbox / drop["name"]).exists()


def _store(state: Path, rows: _Rows) -> Iterator[str]:
    for path in (state / "drops").iterdir():
        if path.suffix == ".jsonl" and _sha256(path) != path.stem:
            yield f"drops/{path.name} does not hash to its name"
    for drop in rows.drops:
        if (
            drop["state"] in {"accepted", "withdrawn", "suspended"}
            and not (state / f"drops/{drop['sha256']}.jsonl").exists()
        ):
            yield f"drop {drop['id']} is {drop['state']} and its content is not in the store"
    accepted = Counter(
        (drop["track"], drop["role"], drop["sha256"]) for drop in rows.drops if drop["state"] == "accepted"
    )
    yield from (f"{key} is accepted {count} times" for key, count in accepted.items() if count > 1)


def _runs(rows: _Rows) -> Iterator[str]:
    for run in rows.runs:
        state = "waiting" if run["about_drop"] else "queued"
        for event in (event for event in rows.events if event["run_id"] == run["id"]):
            after = _MOVES.get(event["kind"], state)
            if event["kind"] == "run_retried":
                after = "queued" if run["snapshot"] is None else "waiting"
            if after != state and RunState(after) not in ALLOWED[RunState(state)]:
                yield f"run {run['id']} went from {state} to {after}"
            state = after
        if state != run["state"]:
            yield f"run {run['id']} is {run['state']} and its events say {state}"
    gone = {drop["id"] for drop in rows.drops if drop["state"] == "withdrawn"}
    promoted = {row["run_id"] for row in rows.promotions}
    for run in rows.runs:
        # A run that is retried takes its snapshot anew when it is claimed.
        going = run["state"] in {"running", "waiting"} and run["config"] is not None and not run["cancel_requested"]
        made = set(json.loads(run["snapshot"] or "[]"))
        if (going or run["outcome"] == "awaiting_approval") and run["id"] not in promoted and made & gone:
            yield f"run {run['id']} goes on with drops that are withdrawn: {sorted(made & gone)}"
    tried = Counter(one["track"] for one in rows.suspects if one["ended"] is None and one["trial_run"] is not None)
    yield from (f"track {track} has {count} trials at a time" for track, count in tried.items() if count > 1)
    opened = Counter(run["track"] for run in rows.runs if run["state"] == "queued")
    yield from (f"track {track} has {count} queued runs" for track, count in opened.items() if count > 1)
    nights = Counter((slot["track"], slot["due_at"]) for slot in rows.slots)
    yield from (f"night {night} was taken {count} times" for night, count in nights.items() if count > 1)


def _attempts(state: Path, rows: _Rows) -> Iterator[str]:
    running = {run["id"] for run in rows.runs if run["state"] == "running"}
    keys = set()
    for attempt in rows.attempts:
        if attempt["state"] == "submitted":
            keys.add(f"{attempt['run_id']}-{attempt['step']}-{attempt['number']}")
            if attempt["run_id"] not in running:
                yield f"attempt {attempt['id']} is open and its run does not run"
    for entry in (state / "spool" / "queue").glob("[!.]*.json"):
        run, step, number = entry.stem.split("-")
        called_off = (state / f"runs/{run}/attempts/{step}-{number}" / REVOKED_NAME).exists()
        if entry.stem not in keys and not called_off and int(run) in running:
            yield f"the spool orders {entry.stem}, which is no open attempt"
    for path in (state / "runs").glob("*/[a-z]*.json"):
        json.loads(path.read_text())


def _champions(state: Path, rows: _Rows) -> Iterator[str]:
    for track in rows.tracks:
        changes = (row for row in rows.promotions if row["track"] == track["name"])
        done = sorted(changes, key=lambda row: row["generation"])
        if [row["generation"] for row in done] != list(range(len(done))):
            yield f"generations of track {track['name']}: {[row['generation'] for row in done]}"
        if not done:
            continue
        last, link = done[-1], state / "tracks" / track["name"] / "champion"
        if (track["champion_generation"], track["champion_model_id"]) != (last["generation"], last["model_id"]):
            yield f"the row of track {track['name']} is not its last change"
        where = (state / last["model_path"]).resolve()
        if link.resolve() != where:
            yield f"champion of track {track['name']} leads to {link.resolve()}, not to {where}"
        found = verify_manifest(where) if where.is_relative_to(state.resolve()) else model_id(where)
        if found != last["model_id"]:
            yield f"champion of track {track['name']} is {found}, not {last['model_id']}"
        if not (link.with_name("previous") / "config.json").exists():
            yield f"previous of track {track['name']} leads nowhere"
        yield from _awaiting(state, rows, track)
    yield from _told(rows)


def _told(rows: _Rows) -> Iterator[str]:
    """Each change is told once, and each run promoted once."""
    by_run = Counter(row["run_id"] for row in rows.promotions if row["kind"] == "promotion")
    for kind, verb in (("forced", "forced"), ("rollback", "rolled_back")):
        count = Counter((row["track"], row["generation"]) for row in rows.promotions if row["kind"] == kind)
        said = Counter(
            (event["track"], json.loads(event["detail"])["generation"])
            for event in rows.events
            if event["kind"] == verb
        )
        if count != said:
            yield f"changes of kind {kind} are {dict(count)} and the events say {dict(said)}"
    told = Counter(event["run_id"] for event in rows.events if event["kind"] == "promoted")
    yield from (f"run {run} was promoted {count} times" for run, count in (by_run | told).items() if count > 1)


def _awaiting(state: Path, rows: _Rows, track: dict[str, Any]) -> Iterator[str]:
    """A win waits with a model that is there, compared with the champion that serves, and was not promoted."""
    # A run that was forced and then retried may win by itself.
    promoted = {row["run_id"] for row in rows.promotions if row["kind"] == "promotion"}
    for run in rows.runs:
        if run["track"] != track["name"] or run["outcome"] != "awaiting_approval":
            continue
        verdict = json.loads((state / f"runs/{run['id']}/decide.json").read_text())
        if verdict["champion_generation"] != track["champion_generation"]:
            yield f"run {run['id']} waits with a win over generation {verdict['champion_generation']}"
        if run["id"] in promoted:
            yield f"run {run['id']} waits for approval and was promoted"
        verify_manifest(state / "models" / verdict["candidate_model_id"])


def _leftovers(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.name.endswith((".tmp", ".new", ".part")):
            yield f"left over: {path.relative_to(folder)}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
