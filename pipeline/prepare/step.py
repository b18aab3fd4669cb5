"""
Run the prepare step: the snapshot's drops → train, dev and held-out rows, deduplicated and split without overlap.

A record's split depends on its unit alone: its group, a long input, or its prompt. u = sha256(salt, unit),
length-prefixed, is read as a number in [0, 1). The prompt is the text that the model reads, instruction and input
folded into one: a record that is dropped folded already is the same record. Rows are sorted in memory by the hash of
salt and normalised prompt.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Dataset, Shortfall
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate.suites import read_suites
from pipeline.metrics.automatic import metric_of
from pipeline.models.manifest import trained_ids
from pipeline.models.template import fold
from pipeline.models.token_counts import Window
from pipeline.prepare.decontaminate import HeldOut, find_groups
from pipeline.prepare.drop_rows import CHECK_EVERY, LeftOut, read_drops
from pipeline.prepare.replaced import replaced_heldout, replacements
from pipeline.prepare.sample import scoring_order
from pipeline.prepare.split import LEAST_DEV_ROWS, Prompt, Splits, choose_unit, heldout_line, prompts, row_line
from pipeline.prepare.start import choose_start, general_rows
from pipeline.prepare.warnings import contamination_warnings, data_warnings, long_rows
from pipeline.records.heldout import dataset_hash, rows_for, version_of

_TOKENS_STEP = 16
_MOST_TOKENS = 1024


def prepare(attempt: Attempt) -> Dataset:
    """
    Write `train.jsonl`, `dev.jsonl` and `heldout.jsonl` from the drops in the spec, and return their description.

    Rows are {"id", "instruction", "input", "output", "drop"}; general rows that are mixed in have no "drop". Held-out
    rows, of which only the scored ones are written, have "references", "pinned", "tags", "near" (the ids of
    near-duplicates in any split) and "group" (the lowest id in its group), too. If the training starts from the
    champion, `train.jsonl` has the rows that are new to it and a sample of the others.
    Warnings about the data go to standard error, too. Raises `CannotTrain` if a drop is damaged, no training rows are
    left, the settings never allow a verdict, or a suite in the settings cannot be read; `Interrupted` if stopped.
    """
    # The evaluation reads them hours later: an error in one is reported before anything is trained.
    read_suites(attempt.config.evaluate.general, attempt.spec.run)
    config, split, spec = attempt.config, attempt.config.split, attempt.spec
    # The settings alone say what is judged on, never what was dropped.
    pinned = config.gate.on == "pinned"
    window = Window(Path(config.base_model), config.train.max_length)
    rows, left_out, lengths = read_drops(attempt, window)
    unit = config.unit or choose_unit(rows)
    found = list(prompts(rows, split, unit, pinned=pinned))
    heldout = HeldOut(_watched(attempt, found, "comparing"), split.similarity)
    splits = Splits(window, split.scored_records, frozenset(spec.champion.drops or ()))
    for prompt in _watched(attempt, found, "splitting"):
        if prompt.split != "heldout":
            splits.add(prompt, heldout.keep(prompt))
    if len(splits.dev) < LEAST_DEV_ROWS:
        splits.train, splits.dev = [*splits.train, *splits.dev], []
    among = {prompt.rows[0].id for prompt in heldout.prompts}.union(*heldout.near.values())
    trained = trained_ids(attempt.path(spec.champion.path), among)
    for number in scoring_order(heldout, spec.champion.generation, split.scored_records):
        splits.hold_out(heldout.prompts[number], heldout.near.get(number), trained)
    scored = splits.scored
    scored.sort(key=lambda one: one.prompt.rows[0].hash)
    groups = find_groups([one.prompt for one in scored], heldout.common, split.similarity)
    moved, replaced_answers = replaced_heldout(scored, splits.known_drops)
    metric = _metric(attempt, splits)
    shortfall = _shortfall(attempt, splits, groups, metric)
    rows_over_window, long = long_rows(lengths, sum(drop.rows for drop in spec.drops), window)
    if not splits.train:
        raise _nothing_to_train(attempt, splits, left_out, long)
    start = choose_start(attempt, splits.train)
    asked = [one.prompt.rows[0] for one in scored]
    general = general_rows(
        len(start.rows),
        config.train.general_rows,
        {row.id for row in (*start.rows, *splits.dev, *asked)},
        [fold(row.instruction, row.input) for row in asked],
        split.similarity,
    )
    folder = attempt.make_folder("data")
    _write(folder / "train.jsonl", [*(row_line(row, drop=row.drop) for row in start.rows), *general])
    _write(folder / "dev.jsonl", (row_line(row, drop=row.drop) for row in splits.dev))
    _write(folder / "heldout.jsonl", map(heldout_line, scored, groups))
    warnings = (*long, *data_warnings(spec, splits, heldout, len(set(groups)), metric))
    sys.stderr.writelines(f"{warning}\n" for warning in warnings)
    return Dataset(
        folder=attempt.relative(folder),
        start=start.champion,
        from_base=start.from_base,
        train_rows=len(start.rows),
        old_rows=start.old,
        replayed_rows=start.replayed,
        general_rows=len(general),
        dev_rows=len(splits.dev),
        heldout_rows=len(scored),
        heldout_groups=len(set(groups)),
        unit=unit,
        heldout_pinned=pinned and any(drop.role == "heldout" for drop in spec.drops),
        heldout_version=version_of([row.id for row in asked]),
        dataset_sha256=dataset_hash(folder),
        duplicates=splits.duplicates,
        replaced=splits.replaced.total(),
        replacements=replacements(splits),
        heldout_replaced=moved,
        replaced_answers=replaced_answers,
        removed_heldout=splits.removed_heldout.total(),
        rows_too_long=left_out.too_long + splits.too_long,
        rows_over_window=rows_over_window,
        rows_with_special_tokens=left_out.special_tokens,
        near_duplicates=splits.near_duplicates,
        overlaps=tuple(heldout.examples),
        heldout_duplicates=splits.heldout_duplicates,
        seen_by_champion=splits.seen_by_champion,
        warnings=warnings,
        metric=metric,
        max_new_tokens=config.evaluate.max_new_tokens or _max_new_tokens(splits.longest_answer, window),
        shortfall=shortfall,
    )


def _watched(attempt: Attempt, found: Sequence[Prompt], phase: str) -> Iterator[Prompt]:
    """Yield the prompts, and report progress as `phase`. Raises `Interrupted` if stopped."""
    for number, prompt in enumerate(found):
        if number % CHECK_EVERY == 0:
            attempt.check_stop()
            attempt.progress(number, len(found), phase=phase)
        yield prompt


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _metric(attempt: Attempt, splits: Splits) -> str:
    """Return the primary metric: as configured, else chosen by scored answers, or training answers without any."""
    if attempt.config.evaluate.metric != "auto":
        return attempt.config.evaluate.metric
    held_out = [row.output for one in splits.scored for row in one.prompt.rows]
    return metric_of(held_out or [row.output for row in splits.train[:CHECK_EVERY]]) or "rougeL"


def _max_new_tokens(longest: int, window: Window) -> int:
    """Return the limit of generated tokens per answer, for references of at most `longest` tokens."""
    most = min(2 * longest, max(longest, _MOST_TOKENS)) if window.counts else min(longest, _MOST_TOKENS)
    return max(1, math.ceil(most / _TOKENS_STEP)) * _TOKENS_STEP


def _shortfall(attempt: Attempt, splits: Splits, groups: Sequence[str], metric: str) -> Shortfall | None:
    """Return how many rows a verdict lacks, `None` if none. Raises `CannotTrain` if the settings never allow one."""
    gate, split = attempt.config.gate, attempt.config.split
    needed = gate.least_groups(metric)
    if gate.on != "pinned" and not split.heldout:
        message = "no verdict is ever possible: split.heldout = 0, which the track's first run fixed, holds nothing out"
        raise CannotTrain(message, 'set gate.on = "pinned", then pin records: dropforge submit --heldout FILE')
    scored = splits.scored
    known = attempt.spec.champion.drops if gate.on == "seen" else None
    judged = len({group for one, group in zip(scored, groups, strict=True) if known is None or one.drop in known})
    if judged >= needed:
        return None
    grouped, most = len(set(groups)), split.scored_records
    if most < needed or (len({one.prompt.unit for one in scored}) >= most and grouped < needed):
        raise CannotTrain(
            f"no verdict is ever possible: split.scored_records = {most} records count at most, {grouped} different "
            f"ones by now, and {'twice ' * (needed > gate.min_records)}gate.min_records = {gate.min_records} are "
            "needed",
            "raise the former or lower the latter in dropforge.toml",
        )
    # Further rows of the same kind repeat each other, or ask about one document, as often.
    apart = max(1, grouped) / max(1, splits.heldout_prompts - splits.heldout_duplicates - splits.seen_by_champion)
    missing = needed - judged
    rows = (missing if gate.on == "pinned" else rows_for(missing, split.heldout)) / apart
    return Shortfall(heldout_rows=judged, needed_heldout_rows=needed, needed_rows=math.ceil(rows))


def _nothing_to_train(attempt: Attempt, splits: Splits, left_out: LeftOut, long: Sequence[str]) -> CannotTrain:
    if not any(drop.role == "train" for drop in attempt.spec.drops):
        return CannotTrain(
            "the snapshot holds held-out records only", "drop training data into the track's inbox folder"
        )
    reasons = {
        "held out": splits.heldout_rows,
        "with a prompt in the held-out set": splits.removed_heldout.total(),
        "duplicates": splits.duplicates,
        "near-duplicates of held-out records": splits.near_duplicates,
        "with special tokens of the base model's tokenizer": left_out.special_tokens,
        "longer than train.max_length": left_out.too_long,
    }
    found = ", ".join(f"{number:,} {why}" for why, number in reasons.items() if number)
    message = f"no training rows are left of {splits.rows + sum(left_out)}: {found}"
    return CannotTrain(
        "; ".join([message, *long, *contamination_warnings(splits, attempt.spec.drops)]),
        "drop more rows, and other ones than those that are held out",
    )
