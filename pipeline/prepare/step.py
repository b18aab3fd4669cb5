"""
The snapshot's drops → train, dev and held-out rows: deduplicated, and split so that nothing can cross over.

A record's split depends on its prompt alone: u = sha256(salt, normalised prompt), length-prefixed, read as a number in
[0, 1). The prompt is what the model reads, instruction and input folded into one text: a record that comes folded
already is the same record. Rows are sorted by it on disk, in parts; what grows in memory with the data is the held-out
set (`pipeline.prepare.decontaminate`).
"""

import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Dataset, ModelRef, Shortfall
from pipeline.config import SplitConfig
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate.suites import read_suites
from pipeline.metrics.automatic import metric_of
from pipeline.models.token_counts import Window
from pipeline.models.trained_ids import trained_ids
from pipeline.prepare.decontaminate import HeldOut
from pipeline.prepare.groups import find_groups
from pipeline.prepare.partitions import Partitions
from pipeline.prepare.snapshot_reader import CHECK_EVERY, SnapshotReader
from pipeline.prepare.split import Familiar, Prompt, SplitWriter, Totals, prompts
from pipeline.prepare.start import Kept, choose_start, keep_new_rows, mix_in_general
from pipeline.prepare.warnings import (
    contamination_warnings,
    data_warnings,
    group_warnings,
    mostly_alike,
    pinned_warnings,
    reference_warnings,
    seen_warnings,
)
from pipeline.records.heldout import dataset_hash, version_of, write_groups
from pipeline.records.prompt_hash import rows_for
from pipeline.words import count

_TOKENS_STEP = 16
_MOST_TOKENS = 1024


def prepare(attempt: Attempt) -> Dataset:
    """
    Make `train.jsonl`, `dev.jsonl` and `heldout.jsonl` of the drops in the spec.

    Rows are {"id", "instruction", "input", "output", "drop"}; held-out rows, of which only the scored ones are written,
    have "references", "pinned", "tags", "near" (the ids
    of prompts in any split that are too near to them) and "group" (the first id of those that count as one) too.
    Where the training goes on from the champion, `train.jsonl` has what is new to it and a sample of the rest; general
    rows that are mixed in have no "drop".
    Raises `CannotTrain` if a drop is damaged, no training rows are left, the settings allow no verdict ever, or a suite
    that they name cannot be read.
    """
    # The evaluation reads them hours later: what is wrong with one is said before anything is trained.
    read_suites(attempt.config.evaluate.general, attempt.spec.run)
    split = attempt.config.split
    folder = attempt.make_folder("data")
    # The settings alone say what is judged on, never what was dropped.
    pinned = attempt.config.gate.on == "pinned"
    window = Window(Path(attempt.config.base_model), attempt.config.train.max_length)
    with Partitions(folder) as partitions:
        reading = SnapshotReader(attempt, partitions, window)
        for order, drop in enumerate(attempt.spec.drops):
            reading.read(order, drop)
        if reading.too_long:
            sys.stderr.write(f"in no split: {count(reading.too_long, 'row')} longer than train.max_length\n")
        if reading.spelled:
            sys.stderr.write(
                f"in no split: {count(reading.spelled, 'row')} with special tokens of the base model's tokenizer, from "
                'before the base or the setting changed (intake.special_tokens = "escape" keeps such rows, as plain '
                "text)\n"
            )
        heldout = HeldOut(_prompts(attempt, partitions, "comparing", pinned=pinned), split.similarity)
        with SplitWriter(folder, window, most_scored=split.scored_records) as splits:
            for prompt in _prompts(attempt, partitions, "splitting", pinned=pinned):
                if prompt.split != "heldout":
                    splits.add(prompt, heldout.keep(prompt))
            champion = _familiar(attempt, heldout)
            for number, prompt in enumerate(heldout.prompts):
                splits.hold_out(prompt, heldout.near.get(number), champion)
            totals = splits.finish()
    groups = find_groups(totals.scored, heldout.common, split.similarity)
    write_groups(folder / "heldout.jsonl", groups)
    grouped = len(set(groups))
    metric = _metric(attempt)
    shortfall = _shortfall(attempt, (len(groups), grouped, _judged_groups(attempt, folder)), metric)
    if totals.train_rows == 0:
        raise _nothing_to_train(attempt, totals, heldout, reading)
    start, from_base, kept = _begin(attempt, folder, totals.train_rows)
    general = mix_in_general(folder, kept.new + kept.replayed, attempt.config.train.general_rows, split.similarity)
    warnings = (
        *pinned_warnings(attempt.spec.drops, attempt.config.gate.on),
        *data_warnings(totals, heldout.removed, split.similarity),
        *group_warnings(len(groups), grouped),
        *contamination_warnings(totals, attempt.spec.drops),
        *seen_warnings(totals, attempt.spec.drops),
        *reference_warnings(totals, metric, attempt.spec.drops, attempt.spec.champion),
    )
    sys.stderr.writelines(f"{warning}\n" for warning in warnings)
    return Dataset(
        folder=attempt.relative(folder),
        start=start,
        from_base=from_base,
        train_rows=kept.new + kept.replayed,
        old_rows=kept.old,
        replayed_rows=kept.replayed,
        general_rows=general,
        train_rows_of=totals.train_rows_of,
        dev_rows=totals.dev_rows,
        heldout_rows=len(groups),
        heldout_groups=grouped,
        heldout_pinned=pinned and any(drop.role == "heldout" for drop in attempt.spec.drops),
        heldout_version=version_of([prompt.rows[0].id for prompt in totals.scored]),
        dataset_sha256=dataset_hash(folder),
        duplicates=totals.duplicates,
        replaced=totals.replaced,
        removed_heldout=totals.removed_heldout.total(),
        rows_too_long=reading.too_long + totals.too_long,
        rows_with_special_tokens=reading.spelled,
        near_duplicates=totals.near_duplicates,
        overlaps=heldout.examples(),
        heldout_duplicates=totals.heldout_duplicates,
        seen_by_champion=totals.seen_by_champion,
        warnings=warnings,
        metric=metric,
        max_new_tokens=attempt.config.evaluate.max_new_tokens or _max_new_tokens(totals.longest_answer, window),
        shortfall=shortfall,
        drops=attempt.spec.drops,
    )


def _prompts(attempt: Attempt, partitions: Partitions, phase: str, *, pinned: bool) -> Iterator[Prompt]:
    """Yield all prompts, from the lowest hash to the highest."""
    attempt.progress(0, partitions.parts, phase=phase)
    for number, rows in enumerate(partitions.sorted_parts()):
        attempt.check_stop()
        yield from prompts(rows, attempt.config.split, pinned=pinned)
        attempt.progress(number + 1, partitions.parts)


def _familiar(attempt: Attempt, heldout: HeldOut) -> Familiar:
    """Return what the champion was trained on of the held-out prompts and of those that are near to them."""
    champion = attempt.spec.champion
    ids = {prompt.rows[0].id for prompt in heldout.prompts}.union(*heldout.near.values())
    return Familiar(trained_ids(attempt.path(champion.path), ids), frozenset(champion.drops or ()))


def _begin(attempt: Attempt, folder: Path, rows: int) -> tuple[ModelRef | None, str, Kept]:
    """Choose what the training begins with, why it is the base if it is, and which of so many rows it has."""
    start, from_base = choose_start(attempt)
    if start is not None:
        attempt.check_stop()
        replay = attempt.config.train.replay
        kept = keep_new_rows(folder / "train.jsonl", start, attempt.path(start.path), replay)
        if kept is not None:
            return start, "", kept
        from_base = f"no row is new to generation {start.generation}"
    if from_base:
        sys.stderr.write(f"the training begins at the base: {from_base}\n")
    return None, from_base, Kept(rows, 0, 0)


def _metric(attempt: Attempt) -> str:
    """Return the primary metric: the one that is set, or that of the scored answers; of some others without any."""
    chosen, folder = attempt.config.evaluate.metric, attempt.folder / "data"
    if chosen != "auto":
        return chosen
    held_out = [text for row in durable.read_jsonl(folder / "heldout.jsonl") for text in row["references"]]
    trained = (row["output"] for row in durable.read_jsonl(folder / "train.jsonl"))
    return metric_of(held_out or list(islice(trained, CHECK_EVERY))) or "rougeL"


def _max_new_tokens(longest: int, window: Window) -> int:
    """Return the longest answer that generation allows, in tokens, for references of at most `longest`: some more."""
    most = min(2 * longest, max(longest, _MOST_TOKENS)) if window.counts else min(longest, _MOST_TOKENS)
    return max(1, math.ceil(most / _TOKENS_STEP)) * _TOKENS_STEP


def _judged_groups(attempt: Attempt, folder: Path) -> int:
    """Return how many groups the held-out records are that the gate judges on, by its setting `on`."""
    known = attempt.spec.champion.drops if attempt.config.gate.on == "seen" else None
    heldout = durable.read_jsonl(folder / "heldout.jsonl")
    return len({row["group"] for row in heldout if known is None or row["drop"] in known})


def _shortfall(attempt: Attempt, scored: tuple[int, int, int], metric: str) -> Shortfall | None:
    """
    Say how many rows are missing for a verdict.

    `scored` are the held-out records, their groups, and how many of those the gate judges on. Raises `CannotTrain` if
    no number of rows would do.
    """
    gate, split = attempt.config.gate, attempt.config.split
    twice = metric != "exact_match"
    needed = gate.min_records_continuous if twice else gate.min_records
    if gate.on != "pinned" and not split.heldout:
        message = "no verdict is ever possible: split.heldout = 0, which the track's first run fixed, holds nothing out"
        raise CannotTrain(message, 'set gate.on = "pinned", then pin records: dropforge submit --heldout FILE')
    least = f"{'twice ' * twice}gate.min_records = {gate.min_records}"
    if split.scored_records < needed:
        message = f"no verdict is ever possible: split.scored_records = {split.scored_records}, {least}"
        raise CannotTrain(message, "raise the former or lower the latter in dropforge.toml")
    records, groups, judged = scored
    if judged >= needed:
        return None
    if records >= split.scored_records and groups < needed:
        message = (
            f"no verdict is ever possible: the {count(records, 'record')} that split.scored_records lets count make "
            f"{count(groups, 'group')} of alike ones, and {least} counts groups"
        )
        enough = math.ceil(needed * records / groups)
        raise CannotTrain(message, f"raise split.scored_records to {enough} or more in dropforge.toml")
    # Further rows of the same kind repeat each other as often.
    apart = max(1, groups) / max(1, records)
    missing = needed - judged
    rows = (missing if gate.on == "pinned" else rows_for(missing, split.heldout)) / apart
    return Shortfall(heldout_rows=judged, needed_heldout_rows=needed, needed_rows=math.ceil(rows))


def _nothing_to_train(attempt: Attempt, totals: Totals, heldout: HeldOut, reading: SnapshotReader) -> CannotTrain:
    if not any(drop.role == "train" for drop in attempt.spec.drops):
        return CannotTrain(
            "the snapshot holds held-out records only", "drop training data into the track's inbox folder"
        )
    removed = totals.removed_heldout.total()
    where = f"{totals.heldout_rows} held out, {removed} removed because their prompt is in the held-out set"
    spelled, too_long = reading.spelled, reading.too_long
    rows = totals.rows + spelled + too_long
    message = f"no training rows are left of {rows}: {where}, {count(totals.duplicates, 'duplicate')}"
    if totals.near_duplicates:
        message += f", {totals.near_duplicates} too near to a held-out record"
    if spelled:
        message += f", {spelled} with special tokens of the base model's tokenizer"
    if too_long:
        message += f", {too_long} longer than train.max_length"
    found = contamination_warnings(totals, attempt.spec.drops)
    if found:
        return CannotTrain("; ".join([message, *found]), "drop rows whose prompts are not in inbox/heldout")
    return CannotTrain(message, _more_rows(attempt.config.split, totals, heldout))


def _more_rows(split: SplitConfig, totals: Totals, heldout: HeldOut) -> str:
    if totals.removed_heldout:
        return "drop rows whose prompts are not in inbox/heldout"
    if totals.near_duplicates:
        alike = ", or raise split.similarity if they only look alike" if mostly_alike(heldout.removed) else ""
        return f"drop rows that do not repeat held-out ones{alike}"
    return f"drop more rows: {split.heldout:.0%} of the prompts are held out, whichever they are"
