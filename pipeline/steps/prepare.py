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
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Dataset, Drop, Shortfall
from pipeline.config import SplitConfig
from pipeline.contract import Attempt
from pipeline.dataset.decontaminate import find_overlaps
from pipeline.dataset.files import dataset_hash
from pipeline.dataset.heldout import version_of
from pipeline.dataset.overlaps import Overlaps
from pipeline.dataset.partitions import Spill, SpilledRow
from pipeline.dataset.split import Familiar, Sides, Totals, prompts
from pipeline.dataset.warnings import data_warnings, pinned_warnings, reference_warnings
from pipeline.errors import CannotTrain
from pipeline.evaluation.suites import read_suites
from pipeline.metrics import json_fields
from pipeline.metrics.registry import is_short
from pipeline.model_folder.trained_ids import trained_ids
from pipeline.near_duplicates.signature_files import FOLDER, signature_name
from pipeline.near_duplicates.signatures import SignatureWriter, holds
from pipeline.near_duplicates.word_hashes import WordHasher
from pipeline.prompt import fold
from pipeline.validation.records import Finding, Limits, Record, read_records
from pipeline.validation.special_tokens import control_tokens

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
    have "references", "pinned", "replaced" (whether an earlier pinned drop gave other answers), "tags" and "near" too,
    the ids of prompts on any side that are too near to them. Raises `CannotTrain` if a drop is damaged, no training
    rows are left, the settings allow no verdict ever, or a suite that they name cannot be read.
    """
    # The evaluation reads them hours later: what is wrong with one is said before anything is trained.
    read_suites(attempt.config.evaluate.general, attempt.spec.run)
    split = attempt.config.split
    folder = attempt.make_folder("data")
    # The settings alone say what is judged on, never what was dropped.
    pinned = attempt.config.gate.on == "pinned"
    with Spill(folder) as spill:
        reading = _Reading(attempt, spill)
        for order, drop in enumerate(attempt.spec.drops):
            reading.read(order, drop)
        overlaps, champion = _compare(attempt, spill, reading, pinned=pinned)
        with Sides(folder, overlaps, champion, most_scored=split.scored_records) as sides:
            attempt.progress(0, spill.parts, phase="splitting")
            for number, rows in enumerate(spill.sorted_parts()):
                attempt.check_stop()
                for prompt in prompts(rows, split, pinned=pinned):
                    sides.add(prompt)
                attempt.progress(number + 1, spill.parts)
            totals = sides.finish()
    metric = _metric(attempt, totals)
    shortfall = _shortfall(attempt, totals, metric)
    if totals.train_rows == 0:
        raise _nothing_to_train(attempt, totals, reading.forged)
    warnings = (
        *pinned_warnings(attempt.spec.drops, attempt.config.gate.on),
        *data_warnings(totals, overlaps, split.similarity),
        *reference_warnings(totals, metric, attempt.spec.drops, attempt.spec.champion),
    )
    sys.stderr.writelines(f"{warning}\n" for warning in warnings)
    return Dataset(
        folder=attempt.relative(folder),
        train_rows=totals.train_rows, dev_rows=totals.dev_rows, heldout_rows=len(totals.heldout_ids),
        heldout_pinned=pinned and any(drop.role == "heldout" for drop in attempt.spec.drops),
        heldout_version=version_of(totals.heldout_ids),
        dataset_sha256=dataset_hash(folder), duplicates=totals.duplicates, replaced=totals.replaced,
        removed_heldout=totals.removed_heldout, rows_with_control_tokens=reading.forged,
        near_duplicates=totals.near_duplicates, overlaps=sides.examples.found(),
        heldout_duplicates=totals.heldout_duplicates, seen_by_champion=totals.seen_by_champion, warnings=warnings,
        pins_changed=dict(sorted(totals.pins_changed.items())),
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
    return _id(normalise(fold(instruction, given)))


def prompt_place(salt: str, instruction: str, given: str) -> str:
    """Return the hexadecimal sha256 that decides a prompt's side; as a fraction of its range it is u."""
    return _place(salt, normalise(fold(instruction, given)))


def estimate_tokens(text: str) -> int:
    """
    Return a number of tokens that is certainly enough for `text`.

    One a byte of UTF-8, which is the most that a byte-level tokenizer makes of it (keys, sequences and codes come near
    that), and 4 for a leading blank and the end.
    """
    return len(text.encode("utf-8")) + _MORE_TOKENS


def _id(prompt: str) -> str:
    return hashlib.sha256(_lengths(prompt)).hexdigest()[:32]


def _place(salt: str, prompt: str) -> str:
    return hashlib.sha256(_lengths(salt, prompt)).hexdigest()


def _lengths(*texts: str) -> bytes:
    """Join texts so that no two different lists give the same bytes."""
    encoded = [text.encode("utf-8") for text in texts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in encoded)


class _Reading:
    """Spills the rows of the drops, and makes the signatures of those that have none yet."""

    def __init__(self, attempt: Attempt, spill: Spill) -> None:
        self._attempt = attempt
        self._spill = spill
        self._hasher = WordHasher()
        tokens = control_tokens(Path(attempt.config.base_model)) if attempt.config.special_tokens == "reject" else ()
        self._holds = re.compile("|".join(map(re.escape, tokens))).search if tokens else None
        self._done = 0
        self._total = sum(drop.rows for drop in attempt.spec.drops)
        self.forged = 0
        """Rows that hold control tokens and stay out of every side."""
        self.signatures: list[Path] = []
        """A drop each."""
        self.counts: list[int] = []
        """A drop each: its records."""
        attempt.make_folder(FOLDER)
        attempt.progress(0, self._total, phase="reading")

    def read(self, order: int, drop: Drop) -> None:
        attempt = self._attempt
        path = attempt.path(drop.path)
        _check_whole(attempt, path, drop)
        signer = self._signer(drop)
        number = 0
        with signer or nullcontext():
            for number, record in enumerate(read_records(path, _LIMITS), start=1):
                if isinstance(record, Finding):
                    message = f"drop {drop.id} ({drop.name}), line {record.line}: {record.message}"
                    raise CannotTrain(message, f"take it out: dropforge drops withdraw {drop.id} --reason 'bad row'")
                if signer is not None:
                    signer.add(record.instruction, record.input, record.output)
                self._take(record, drop, order, number - 1)
        self.counts.append(number)

    def _take(self, record: Record, drop: Drop, order: int, number: int) -> None:
        if self._holds is not None and any(map(self._holds, (record.instruction, record.input, record.output))):
            self.forged += 1
        else:
            self._spill.add(_spilled(self._attempt.config.salt, record, drop, (order, number)))
        self._done += 1
        if self._done % _CHECK_EVERY == 0:
            self._attempt.check_stop()
            self._attempt.progress(self._done, self._total)

    def _signer(self, drop: Drop) -> SignatureWriter | None:
        """Find the drop's signatures; if there are none that hold, return what makes them."""
        name = signature_name(drop.sha256)
        kept, own = self._attempt.root / FOLDER / name, self._attempt.folder / FOLDER / name
        found = next((path for path in (own, kept) if holds(path, drop.rows)), None)
        self.signatures.append(found or own)
        return SignatureWriter(own, self._hasher) if found is None else None


def _compare(attempt: Attempt, spill: Spill, reading: _Reading, *, pinned: bool) -> tuple[Overlaps, Familiar]:
    """Find what is too near to the held-out set; return that, and what of all this the champion knows."""
    if reading.forged:
        sys.stderr.write(
            f"{reading.forged} rows hold control tokens of the base model's tokenizer and are on no side: they came "
            'before the base or the setting changed (intake.special_tokens = "escape" keeps such rows, as plain text)\n'
        )
    overlaps = Overlaps(reading.counts)
    heldout: set[str] = set()
    attempt.progress(0, spill.parts, phase="sorting")
    for number, rows in enumerate(spill.sorted_parts()):
        attempt.check_stop()
        for prompt in prompts(rows, attempt.config.split, pinned=pinned):
            if prompt.side == "heldout":
                overlaps.hold_out(prompt.rows, prompt.removed)
                heldout.add(prompt.rows[0].id)
            else:
                overlaps.train(prompt.rows)
        attempt.progress(number + 1, spill.parts)
    attempt.progress(0, 1, phase="comparing")
    find_overlaps(reading.signatures, overlaps, attempt.config.split.similarity, attempt.check_stop)
    champion = attempt.spec.champion
    heldout.update(overlaps.near())
    return overlaps, Familiar(trained_ids(attempt.path(champion.path), heldout), frozenset(champion.drops or ()))


def _check_whole(attempt: Attempt, path: Path, drop: Drop) -> None:
    attempt.check_stop()
    hint = f"drop the file again, or take it out: dropforge drops withdraw {drop.id} --reason damaged"
    if not path.is_file():
        message = f"drop {drop.id} ({drop.name}) is gone from the store: {drop.path}"
        raise CannotTrain(message, hint)
    if durable.sha256_file(path) != drop.sha256:
        message = f"drop {drop.id} ({drop.name}) is damaged: its bytes no longer have the hash that they came with"
        raise CannotTrain(message, hint)


def _spilled(salt: str, record: Record, drop: Drop, place: tuple[int, int]) -> SpilledRow:
    prompt = normalise(fold(record.instruction, record.input))
    return SpilledRow(
        place=_place(salt, prompt), id=_id(prompt), pinned=drop.role == "heldout", order=place[0], number=place[1],
        drop=drop.id, instruction=record.instruction, input=record.input, output=record.output, tags=record.tags,
        tokens=estimate_tokens(record.output),
        short=is_short(record.output, SHORT_WORDS),
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
    return sum(json_fields.parse(text) is not None for text in answers) / max(1, len(answers))


def _max_new_tokens(attempt: Attempt, totals: Totals) -> int:
    """Return the longest answer that generation allows, in tokens: a multiple of 16."""
    chosen = attempt.config.evaluate.max_new_tokens
    if chosen:
        return chosen
    answers = totals.heldout_answers if totals.heldout_answers.count else totals.train_answers
    return min(math.ceil(answers.longest / _TOKENS_STEP) * _TOKENS_STEP, _MOST_TOKENS)


def _shortfall(attempt: Attempt, totals: Totals, metric: str) -> Shortfall | None:
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
    by_hash = gate.on != "pinned" and split.heldout > 0
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
    if totals.near_duplicates:
        message += f", {totals.near_duplicates} too near to a held-out record"
    if forged:
        message += f", {forged} with control tokens of the base model's tokenizer"
    return CannotTrain(message, _more_rows(attempt.config.split, totals))


def _more_rows(split: SplitConfig, totals: Totals) -> str:
    if totals.removed_heldout:
        return "drop rows whose prompts are not in inbox/heldout"
    if totals.near_duplicates:
        return "drop rows that do not repeat held-out ones, or raise split.similarity if they only look alike"
    return f"drop more rows: {split.heldout:.0%} of the prompts are held out, whichever they are"
