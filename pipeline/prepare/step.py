"""
Run the prepare step: the snapshot's drops → train, dev and held-out rows, deduplicated and split without overlap.

A record's split depends on its unit alone: its group, a long input, or its prompt. u = sha256(salt, unit),
length-prefixed, is read as a number in [0, 1). The prompt is the text that the model reads, instruction and input
folded into one, after the turns before it: a record that is dropped folded already is the same record. Rows are sorted
in memory by the hash of salt and normalised prompt.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts import Dataset, Remark, Shortfall
from pipeline.config import RunConfig
from pipeline.contract import Attempt
from pipeline.data_words import left_out_words, remark_words
from pipeline.errors import CannotTrain
from pipeline.evaluate.suites import read_suites
from pipeline.metrics.automatic import metric_of
from pipeline.models.tokenizer_files import Window
from pipeline.prepare.decontaminate import MOST_EXAMPLES, Splits, assign
from pipeline.prepare.sample import Selection, heldout_line, row_line, select
from pipeline.prepare.split import CHECK_EVERY, DropRows, Prompt, read_drops
from pipeline.prepare.start import Start, choose_start, general_rows, try_base
from pipeline.prepare.warnings import (
    contamination_warnings,
    counts_by_drops,
    data_warnings,
    fit_template,
    long_rows,
    proposed_answers,
)
from pipeline.records.heldout import dataset_hash, rows_for, version_of

_TOKENS_STEP = 16
_MOST_TOKENS = 1024


def prepare(attempt: Attempt) -> Dataset:
    """
    Write `train.jsonl`, `dev.jsonl` and `heldout.jsonl` from the drops in the spec, and return their description.

    Rows are {"id", "instruction", "input", "output", "drop"}; those after earlier turns have "turns", role and text of
    each; general rows have no "drop". Held-out rows, of which only the scored ones are written, have "references",
    "pinned", "tags", "near" (the ids of near-duplicates in any split) and "group" (the lowest id in its group), too.
    If the training starts from the champion, `train.jsonl` has the rows that are new to it and a sample of the others.
    Warnings about the data go to standard error, too. Raises `CannotTrain` if a drop is damaged, no training rows are
    left, the settings never allow a verdict, or with them the suites, the base model or its template cannot be used;
    `Interrupted` if stopped.
    """
    # The evaluation reads them hours later: an error in one is reported before anything is trained.
    read_suites(attempt.config.evaluate.general, attempt.spec.run)
    config, drops = attempt.config, attempt.spec.drops
    window = Window(Path(config.base_model), config.train.max_length)
    try_base(config, window)
    read = fit_template(read_drops(attempt, window), config, window)
    splits = assign(read.rows, config, partial(_watched, attempt))
    selection = select(attempt, splits, window)
    metric = _metric(config, splits, selection)
    shortfall = _shortfall(attempt, splits, selection, metric)
    rows_over_window, long = long_rows(read.lengths, sum(drop.records for drop in drops), window)
    if not splits.train:
        raise _nothing_to_train(attempt, read, splits, selection, long)
    start = choose_start(attempt, splits.train)
    general = general_rows(config.train.general_rows, start.rows, splits)
    lines = [*(row_line(row, drop=row.drop) for row in start.rows), *map(row_line, general)]
    folder = _write(attempt, lines, splits, selection)
    warnings = (*long, *read.remarks, *data_warnings(attempt.spec, splits, selection, metric))
    sys.stderr.writelines(f"{remark_words(warning)}\n" for warning in warnings)
    return Dataset(
        folder=attempt.relative(folder),
        dataset_sha256=dataset_hash(folder),
        general_rows=len(general),
        rows_over_window=rows_over_window,
        warnings=warnings,
        metric=metric,
        max_new_tokens=config.evaluate.max_new_tokens or _max_new_tokens(selection.longest_answer, window),
        shortfall=shortfall,
        **_counts(attempt, read, splits, selection, start),
    )


def _counts(attempt: Attempt, read: DropRows, splits: Splits, selection: Selection, start: Start) -> dict[str, Any]:
    """Return the fields of `Dataset` on the start, the rows per split, and those in no split by reason."""
    pinned = attempt.config.gate.on == "pinned" and any(drop.role == "heldout" for drop in attempt.spec.drops)
    replaced, proposed = counts_by_drops(splits.prompts)
    return {
        "start": start.champion,
        "from_base": start.from_base,
        "train_rows": len(start.rows),
        "old_rows": start.old,
        "replayed_rows": start.replayed,
        "dev_rows": len(splits.dev),
        "heldout_rows": len(selection.scored),
        "heldout_groups": len(set(selection.groups)),
        "heldout_with_turns": sum(row.turns != () for row in selection.rows),
        "heldout_pinned": pinned,
        "heldout_version": version_of([row.id for row in selection.rows]),
        "heldout_duplicates": splits.heldout_duplicates,
        "unit": splits.unit,
        "duplicates": sum(prompt.duplicates for prompt in splits.prompts),
        "replaced": sum(part.rows for part in replaced),
        "replacements": replaced,
        "proposals": proposed,
        "proposed_answers": proposed_answers(splits.prompts),
        "removed_heldout": splits.removed.total(),
        "near_duplicates": splits.near_duplicates,
        "overlaps": tuple(part.example for part in splits.left_out[:MOST_EXAMPLES]),
        "rows_refused": read.refused,
        "rows_too_long": read.too_long + selection.too_long,
        "rows_with_special_tokens": read.special_tokens,
        "seen_by_champion": selection.seen,
    }


def _watched(attempt: Attempt, prompts: Sequence[Prompt], phase: str) -> Iterator[Prompt]:
    """Yield the prompts, and report progress as `phase`. Raises `Interrupted` if stopped."""
    for number, prompt in enumerate(prompts):
        if number % CHECK_EVERY == 0:
            attempt.check_stop()
            attempt.progress(number, len(prompts), phase=phase)
        yield prompt


def _write(attempt: Attempt, train: Iterable[Mapping[str, Any]], splits: Splits, selection: Selection) -> Path:
    """Write train.jsonl, dev.jsonl and heldout.jsonl into the new folder `data`, and return that."""
    folder = attempt.make_folder("data")
    files = {
        "train": train,
        "dev": (row_line(row, drop=row.drop) for row in splits.dev),
        "heldout": map(heldout_line, selection.scored, selection.groups),
    }
    for name, lines in files.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return folder


def _metric(config: RunConfig, splits: Splits, selection: Selection) -> str:
    """
    Return the primary metric: as configured, else by the scored answers, or without any by the first training answers.

    Without these, too, it is ROUGE-L.
    """
    if config.evaluate.metric != "auto":
        return config.evaluate.metric
    held_out = [row.output for record in selection.scored for row in record.prompt.rows]
    return metric_of(held_out or [row.output for row in splits.train[:CHECK_EVERY]]) or "rougeL"


def _max_new_tokens(longest: int, window: Window) -> int:
    """
    Return the limit of generated tokens per answer: twice `longest`, the tokens of the longest reference.

    It is at most the larger of 1,024 and `longest`; without a tokenizer.json, when `longest` is in bytes, at most the
    smaller. Then it is rounded up to a multiple of 16, at least 16.
    """
    most = min(2 * longest, max(longest, _MOST_TOKENS)) if window.counts else min(longest, _MOST_TOKENS)
    return max(1, math.ceil(most / _TOKENS_STEP)) * _TOKENS_STEP


def _shortfall(attempt: Attempt, splits: Splits, selection: Selection, metric: str) -> Shortfall | None:
    """Return how many rows a verdict lacks, `None` if none. Raises `CannotTrain` if the settings never allow one."""
    gate, split = attempt.config.gate, attempt.config.split
    needed = gate.least_groups(metric)
    if gate.on != "pinned" and not split.heldout:
        message = "no verdict is ever possible: split.heldout = 0 holds nothing out"
        raise CannotTrain(message, 'set gate.on = "pinned", then pin records: dropforge submit --heldout FILE')
    scored, groups = selection.scored, selection.groups
    known = attempt.spec.champion.drops if gate.on == "seen" else None
    judged = len({group for record, group in zip(scored, groups, strict=True) if known is None or record.drop in known})
    if judged >= needed:
        return None
    grouped, most = len(set(groups)), split.scored_records
    if most < needed or (len({record.prompt.unit for record in scored}) >= most and grouped < needed):
        raise CannotTrain(
            f"no verdict is ever possible: split.scored_records = {most} records count at most, {grouped} different "
            f"ones by now, and {'twice ' * (needed > gate.min_records)}gate.min_records = {gate.min_records} are "
            "needed",
            "raise the former or lower the latter in dropforge.toml",
        )
    # Further rows of the same kind repeat each other, or ask about one document, as often.
    apart = max(1, grouped) / max(1, len(splits.heldout.near) - selection.seen)
    missing = needed - judged
    records = (missing if gate.on == "pinned" else rows_for(missing, split.heldout)) / apart
    drops = attempt.spec.drops
    rows = records * sum(drop.rows for drop in drops) / max(1, sum(drop.records for drop in drops))
    return Shortfall(heldout_rows=judged, needed_heldout_rows=needed, needed_rows=math.ceil(rows))


def _nothing_to_train(
    attempt: Attempt, read: DropRows, splits: Splits, selection: Selection, long: Sequence[Remark]
) -> CannotTrain:
    drops = attempt.spec.drops
    if not any(drop.role == "train" for drop in drops):
        return CannotTrain(
            "the snapshot holds held-out records only", "drop training data into the track's inbox folder"
        )
    held_out = sum(len(prompt.rows) for prompt in splits.heldout.prompts)
    left_out = left_out_words(Dataset.model_construct(**_counts(attempt, read, splits, selection, Start([]))))
    where = ", ".join(filter(None, (f"{held_out:,} held out" if held_out else "", left_out)))
    message = f"no training records are left of {sum(drop.records for drop in drops)}: {where}"
    remarks = map(remark_words, (*long, *read.remarks, *contamination_warnings(splits, drops)))
    return CannotTrain("; ".join([message, *remarks]), "drop more rows, and other ones than those that are held out")
