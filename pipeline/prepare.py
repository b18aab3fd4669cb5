"""
The snapshot's drops → train, dev and held-out rows: deduplicated, and split so that nothing can cross over.

A record's side depends on its prompt alone: u = sha256(salt, normalised prompt), length-prefixed, read as a number in
[0, 1). The prompt is what the model reads, instruction and input folded into one text: a record that comes folded
already is the same record. Rows are sorted by it on disk, in parts, so memory does not grow with the data.
"""

import hashlib
import math
import re
import sys
import unicodedata
from itertools import islice
from pathlib import Path

from pipeline import durable, json_answers
from pipeline.artifacts import Dataset, Drop, Shortfall
from pipeline.config import SplitConfig
from pipeline.contract import Attempt
from pipeline.control_tokens import control_tokens
from pipeline.dataset_files import dataset_hash
from pipeline.errors import CannotTrain
from pipeline.prompt import fold
from pipeline.records import Finding, Limits, Record, read_records
from pipeline.sides import Sides, Spill, SpilledRow, Totals

LEAST_DEV_ROWS = 20
SHORT_WORDS = 5
SHORT_SHARE = 0.8
_CHECK_EVERY = 1000
#: The intake bounded the lines already, perhaps by another setting than today's.
_LIMITS = Limits(max_line_bytes=1 << 40)
_TOKENS_STEP = 16
_MORE_TOKENS = 4
_MOST_TOKENS = 1024


def prepare(attempt: Attempt) -> Dataset:
    """
    Make `train.jsonl`, `dev.jsonl` and `heldout.jsonl` of the drops in the spec.

    Rows are {"id", "instruction", "input", "output", "drop"}; held-out rows, of which only the scored ones are written,
    have "references" too. Raises `CannotTrain` if a drop is damaged, no training rows are left, or the settings allow
    no verdict ever.
    """
    split, gate = attempt.config.split, attempt.config.gate
    folder = attempt.make_folder("data")
    pinned = any(drop.role == "heldout" for drop in attempt.spec.drops)
    judged = pinned or gate.on == "all"
    with Spill(folder) as spill, Sides(folder, split, LEAST_DEV_ROWS, pinned=pinned, judged=judged) as sides:
        forged = _read_drops(attempt, spill)
        attempt.progress(0, spill.parts, phase="splitting")
        for number, rows in enumerate(spill.sorted_parts()):
            attempt.check_stop()
            sides.add(rows)
            attempt.progress(number + 1, spill.parts)
        totals = sides.finish()
    metric = _metric(attempt, totals)
    shortfall = _shortfall(attempt, totals, metric, pinned=pinned)
    if totals.train_rows == 0:
        raise _nothing_to_train(attempt, totals, forged)
    return Dataset(
        folder=attempt.relative(folder),
        train_rows=totals.train_rows, dev_rows=totals.dev_rows, heldout_rows=len(totals.heldout_ids),
        heldout_pinned=pinned, heldout_version=_version(totals.heldout_ids),
        dataset_sha256=dataset_hash(folder), duplicates=totals.duplicates, replaced=totals.replaced,
        removed_heldout=totals.removed_heldout, rows_with_control_tokens=forged,
        metric=metric, max_new_tokens=_max_new_tokens(attempt, totals),
        shortfall=shortfall, drops=attempt.spec.drops,
    )  # fmt: skip


def normalise(text: str) -> str:
    """Return the form in which two prompts are the same: NFKC, case folded, blanks collapsed."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def prompt_id(instruction: str, given: str) -> str:
    """Return a record's id, 32 hexadecimal digits: the same for prompts that are the same once normalised."""
    return hashlib.sha256(_lengths(normalise(fold(instruction, given)))).hexdigest()[:32]


def prompt_place(salt: str, instruction: str, given: str) -> str:
    """Return the hexadecimal sha256 that decides a prompt's side; as a fraction of its range it is u."""
    return hashlib.sha256(_lengths(salt, normalise(fold(instruction, given)))).hexdigest()


def estimate_tokens(text: str) -> int:
    """
    Return a number of tokens that is certainly enough for `text`.

    One a byte of UTF-8, which is the most that a byte-level tokenizer makes of it (keys, sequences and codes come near
    that), and 4 for a leading blank and the end.
    """
    return len(text.encode("utf-8")) + _MORE_TOKENS


def _lengths(*texts: str) -> bytes:
    """Join texts so that no two different lists give the same bytes."""
    encoded = [text.encode("utf-8") for text in texts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)


def _read_drops(attempt: Attempt, spill: Spill) -> int:
    """Spill the rows of all drops; return how many hold control tokens and stay out of every side."""
    drops = attempt.spec.drops
    tokens = control_tokens(Path(attempt.config.base_model)) if attempt.config.special_tokens == "reject" else ()
    holds = re.compile("|".join(map(re.escape, tokens))).search if tokens else None
    forged = 0
    total = sum(drop.rows for drop in drops)
    done = 0
    attempt.progress(0, total, phase="reading")
    for order, drop in enumerate(drops):
        path = attempt.path(drop.path)
        _check_whole(attempt, path, drop)
        for record in read_records(path, _LIMITS):
            if isinstance(record, Finding):
                message = f"drop {drop.id} ({drop.name}), line {record.line}: {record.message}"
                raise CannotTrain(message, f"take it out: dropforge drops withdraw {drop.id} --reason 'bad row'")
            if holds is not None and any(map(holds, (record.instruction, record.input, record.output))):
                forged += 1
            else:
                spill.add(_spilled(attempt.config.salt, record, drop, order))
            done += 1
            if done % _CHECK_EVERY == 0:
                attempt.check_stop()
                attempt.progress(done, total)
    if forged:
        sys.stderr.write(
            f"{forged} rows hold control tokens of the base model's tokenizer and are on no side: they came before the "
            'base or the setting changed (intake.special_tokens = "escape" keeps such rows, as plain text)\n'
        )
    return forged


def _check_whole(attempt: Attempt, path: Path, drop: Drop) -> None:
    attempt.check_stop()
    hint = f"drop the file again, or take it out: dropforge drops withdraw {drop.id} --reason damaged"
    if not path.is_file():
        message = f"drop {drop.id} ({drop.name}) is gone from the store: {drop.path}"
        raise CannotTrain(message, hint)
    if durable.sha256_file(path) != drop.sha256:
        message = f"drop {drop.id} ({drop.name}) is damaged: its bytes no longer have the hash that they came with"
        raise CannotTrain(message, hint)


def _spilled(salt: str, record: Record, drop: Drop, order: int) -> SpilledRow:
    return SpilledRow(
        place=prompt_place(salt, record.instruction, record.input), id=prompt_id(record.instruction, record.input),
        pinned=drop.role == "heldout", order=order, line=record.line, drop=drop.id,
        instruction=record.instruction, input=record.input, output=record.output, tokens=estimate_tokens(record.output),
        short=len(record.output.split()) <= SHORT_WORDS,
    )  # fmt: skip


def _metric(attempt: Attempt, totals: Totals) -> str:
    """Return the primary metric: field F1 suits JSON, exact match short answers, ROUGE-L long ones."""
    chosen = attempt.config.evaluate.metric
    if chosen != "auto":
        return chosen
    if _json_share(attempt.folder / "data") >= SHORT_SHARE:
        return "json_f1"
    answers = totals.heldout_answers if totals.heldout_answers.count else totals.train_answers
    return "exact_match" if answers.short >= SHORT_SHARE * answers.count else "rougeL"


def _json_share(folder: Path) -> float:
    """Return the share of JSON objects and arrays among the scored answers, or, where there are none, some others."""
    held_out = [text for row in durable.read_jsonl(folder / "heldout.jsonl") for text in row["references"]]
    trained = (row["output"] for row in durable.read_jsonl(folder / "train.jsonl"))
    answers = held_out or list(islice(trained, _CHECK_EVERY))
    return sum(json_answers.parse(text) is not None for text in answers) / max(1, len(answers))


def _max_new_tokens(attempt: Attempt, totals: Totals) -> int:
    """Return the longest answer that generation allows, in tokens: a multiple of 16."""
    chosen = attempt.config.evaluate.max_new_tokens
    if chosen:
        return chosen
    answers = totals.heldout_answers if totals.heldout_answers.count else totals.train_answers
    return min(math.ceil(answers.longest / _TOKENS_STEP) * _TOKENS_STEP, _MOST_TOKENS)


def _shortfall(attempt: Attempt, totals: Totals, metric: str, *, pinned: bool) -> Shortfall | None:
    """Say how many rows are missing for a verdict. Raises `CannotTrain` if no number of rows would do."""
    gate, split = attempt.config.gate, attempt.config.split
    field = "min_records" if metric == "exact_match" else "min_records_continuous"
    needed: int = getattr(gate, field)
    if split.scored_records < needed:
        message = f"no verdict is ever possible: split.scored_records = {split.scored_records}, gate.{field} = {needed}"
        raise CannotTrain(message, "raise the former or lower the latter in dropforge.toml")
    scored = len(totals.heldout_ids)
    if scored >= needed:
        return None
    missing = needed - scored
    by_hash = not pinned and gate.on == "all" and split.heldout > 0
    rows = math.ceil(missing / split.heldout) if by_hash else missing
    return Shortfall(heldout_rows=scored, needed_heldout_rows=needed, needed_rows=rows)


def _nothing_to_train(attempt: Attempt, totals: Totals, forged: int) -> CannotTrain:
    if not any(drop.role == "train" for drop in attempt.spec.drops):
        return CannotTrain(
            "the snapshot holds held-out records only", "drop training data into the track's inbox folder"
        )
    where = (
        f"{totals.heldout_rows} held out, {totals.removed_heldout} removed because their prompt is in the held-out set"
    )
    message = f"no training rows are left of {totals.rows + forged}: {where}, {totals.duplicates} duplicates"
    if forged:
        message += f", {forged} with control tokens of the base model's tokenizer"
    return CannotTrain(message, _more_rows(attempt.config.split, totals))


def _more_rows(split: SplitConfig, totals: Totals) -> str:
    if totals.removed_heldout:
        return "drop rows whose prompts are not in inbox/heldout"
    return f"drop more rows: {split.heldout:.0%} of the prompts are held out, whichever they are"


def _version(ids: list[str]) -> str:
    """Return one hash of the scored prompts, whatever their order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
