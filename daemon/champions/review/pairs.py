"""The pairs of answers that a blind review shows: drawn by a hash, the sides of each shuffled by another one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from daemon.state import run_files
from pipeline import durable
from pipeline.artifacts import RECORDS_NAME, Evaluation, Frozen
from pipeline.errors import DropforgeError

Side = Literal["candidate", "champion"]
_ID_CHARACTERS = 16


class Pair(Frozen):
    """Both models' answers to one held-out prompt; nothing in it tells whose is which."""

    id: str
    instruction: str
    input: str
    first: str
    second: str


def read_pairs(state_folder: Path, run_id: int, salt: str) -> list[Pair]:
    """
    Return the scored records that both models answered differently, in the order in which they are asked.

    Order and sides are hashes of what was answered and of the track's `salt`: the same pair is shown alike every time.
    Raises `DropforgeError` if the run's records are not there, or damaged.
    """
    found = run_files.load_evaluation(state_folder, run_id)
    path = None if found is None else state_folder / found.folder / RECORDS_NAME
    if found is None or path is None or not path.is_file():
        message = f"run {run_id} has no scored records" + ("" if found is None else " any more")
        raise DropforgeError(message, f"see how far it is, and how it ended: dropforge show {run_id}")
    try:
        pairs = [_pair(found, line, salt) for line in durable.read_jsonl(path) if _differ(line)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"the scored records of run {run_id} are damaged: {path}"
        raise DropforgeError(message, f"bring {path.relative_to(state_folder)} back from a backup") from error
    return sorted(pairs, key=lambda pair: pair.id)


def first_side(pair_id: str, salt: str) -> Side:
    """Return whose answer a pair shows first."""
    return "candidate" if _hash("side", pair_id, salt)[0] in "02468ace" else "champion"


def _differ(line: Mapping[str, Any]) -> bool:
    return bool(line["candidate"]["text"].strip() != line["champion"]["text"].strip())


def _pair(found: Evaluation, line: Mapping[str, Any], salt: str) -> Pair:
    answers: dict[Side, str] = {"candidate": line["candidate"]["text"], "champion": line["champion"]["text"]}
    about = (found.candidate.model_id, found.champion.model_id, line["id"], *answers.values())
    name = _hash("pair", *about)[:_ID_CHARACTERS]
    first: Side = first_side(name, salt)
    second: Side = "champion" if first == "candidate" else "candidate"
    shown = {"instruction": line["instruction"], "input": line["input"]}
    return Pair(id=name, **shown, first=answers[first].strip(), second=answers[second].strip())


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
