"""
Run the prepare step: the snapshot's drops → train, dev and held-out rows, deduplicated and split without overlap.

A record's split depends on its unit alone: its group, a long input, or its prompt. u = sha256(salt, unit),
length-prefixed, is read as a number in [0, 1). The prompt is the text that the model reads, instruction and input
folded into one: a record that is dropped folded already is the same record. Rows are partitioned by the hash of salt
and normalised prompt on disk and sorted; only the held-out set grows in memory with the data
(`pipeline.prepare.decontaminate`).
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

from pipeline import durable
from pipeline.artifacts import Dataset, Shortfall
from pipeline.config import Unit
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate.suites import read_suites
from pipeline.metrics.automatic import metric_of
from pipeline.models.manifest import trained_ids
from pipeline.models.token_counts import Window
from pipeline.prepare.decontaminate import HeldOut, find_groups
from pipeline.prepare.long_rows import long_rows
from pipeline.prepare.partitions import CHECK_EVERY, PARTS, LeftOut, Partitions, read_drops
from pipeline.prepare.replaced import replaced_heldout, replacements
from pipeline.prepare.sample import scoring_order
from pipeline.prepare.split import Familiar, Prompt, Scored, SplitWriter, Totals, choose_unit, prompts, write_heldout
from pipeline.prepare.start import choose_start, mix_in_general
from pipeline.prepare.warnings import contamination_warnings, data_warnings
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
    split, spec = attempt.config.split, attempt.spec
    folder = attempt.make_folder("data")
    # The settings alone say what is judged on, never what was dropped.
    pinned = attempt.config.gate.on == "pinned"
    window = Window(Path(attempt.config.base_model), attempt.config.train.max_length)
    with closing(Partitions(folder)) as partitions:
        left_out = read_drops(attempt, partitions, window)
        unit = attempt.config.unit or choose_unit(partitions.sorted_parts())
        heldout = HeldOut(_prompts(attempt, partitions, unit, "comparing", pinned=pinned), split.similarity)
        with closing(SplitWriter(folder, window, most_scored=split.scored_records)) as splits:
            for prompt in _prompts(attempt, partitions, unit, "splitting", pinned=pinned):
                if prompt.split != "heldout":
                    splits.add(prompt, heldout.keep(prompt))
            champion = _familiar(attempt, heldout)
            for number in scoring_order(heldout, spec.champion.generation, split.scored_records):
                splits.hold_out(heldout.prompts[number], heldout.near.get(number), champion)
    totals, scored = splits.totals, splits.totals.scored
    scored.sort(key=lambda one: one.prompt.rows[0].hash)
    groups = find_groups([one.prompt for one in scored], heldout.common, split.similarity)
    write_heldout(folder / "heldout.jsonl", scored, groups)
    moved, replaced_answers = replaced_heldout(scored, frozenset(spec.champion.drops or ()))
    metric = _metric(attempt, scored)
    shortfall = _shortfall(attempt, totals, groups, metric)
    rows_over_window, long = long_rows(attempt, window)
    if totals.train_rows == 0:
        raise _nothing_to_train(attempt, totals, left_out, long)
    start = choose_start(attempt, folder, totals.train_rows)
    train_rows = start.new + start.replayed
    general = mix_in_general(folder, train_rows, attempt.config.train.general_rows, split.similarity)
    warnings = (*long, *data_warnings(spec, totals, heldout, len(set(groups)), metric))
    sys.stderr.writelines(f"{warning}\n" for warning in warnings)
    return Dataset(
        folder=attempt.relative(folder),
        start=start.champion,
        from_base=start.from_base,
        train_rows=train_rows,
        old_rows=start.old,
        replayed_rows=start.replayed,
        general_rows=general,
        dev_rows=totals.dev_rows,
        heldout_rows=len(scored),
        heldout_groups=len(set(groups)),
        unit=unit,
        heldout_pinned=pinned and any(drop.role == "heldout" for drop in spec.drops),
        heldout_version=version_of([one.prompt.rows[0].id for one in scored]),
        dataset_sha256=dataset_hash(folder),
        duplicates=totals.duplicates,
        replaced=totals.replaced.total(),
        replacements=replacements(totals),
        heldout_replaced=moved,
        replaced_answers=replaced_answers,
        removed_heldout=totals.removed_heldout.total(),
        rows_too_long=left_out.too_long + totals.too_long,
        rows_over_window=rows_over_window,
        rows_with_special_tokens=left_out.special_tokens,
        near_duplicates=totals.near_duplicates,
        overlaps=tuple(heldout.examples),
        heldout_duplicates=totals.heldout_duplicates,
        seen_by_champion=totals.seen_by_champion,
        warnings=warnings,
        metric=metric,
        max_new_tokens=attempt.config.evaluate.max_new_tokens or _max_new_tokens(totals.longest_answer, window),
        shortfall=shortfall,
        drops=spec.drops,
    )


def _prompts(attempt: Attempt, partitions: Partitions, unit: Unit, phase: str, *, pinned: bool) -> Iterator[Prompt]:
    """Yield all prompts in the order of their hash, and report progress as `phase`."""
    attempt.progress(0, PARTS, phase=phase)
    for number, rows in enumerate(partitions.sorted_parts()):
        attempt.check_stop()
        yield from prompts(rows, attempt.config.split, unit, pinned=pinned)
        attempt.progress(number + 1, PARTS)


def _familiar(attempt: Attempt, heldout: HeldOut) -> Familiar:
    """Return the held-out prompts and near-duplicates that the champion was trained on, and its drops."""
    champion = attempt.spec.champion
    ids = {prompt.rows[0].id for prompt in heldout.prompts}.union(*heldout.near.values())
    return Familiar(trained_ids(attempt.path(champion.path), ids), frozenset(champion.drops or ()))


def _metric(attempt: Attempt, scored: Sequence[Scored]) -> str:
    """Return the primary metric: as configured, else chosen by scored answers, or training answers without any."""
    if attempt.config.evaluate.metric != "auto":
        return attempt.config.evaluate.metric
    held_out = [row.output for one in scored for row in one.prompt.rows]
    trained = (row["output"] for row in durable.read_jsonl(attempt.folder / "data" / "train.jsonl"))
    return metric_of(held_out or list(islice(trained, CHECK_EVERY))) or "rougeL"


def _max_new_tokens(longest: int, window: Window) -> int:
    """Return the limit of generated tokens per answer, for references of at most `longest` tokens."""
    most = min(2 * longest, max(longest, _MOST_TOKENS)) if window.counts else min(longest, _MOST_TOKENS)
    return max(1, math.ceil(most / _TOKENS_STEP)) * _TOKENS_STEP


def _shortfall(attempt: Attempt, totals: Totals, groups: Sequence[str], metric: str) -> Shortfall | None:
    """Return how many rows a verdict lacks, `None` if none. Raises `CannotTrain` if the settings never allow one."""
    gate, split = attempt.config.gate, attempt.config.split
    twice = metric != "exact_match"
    needed = gate.min_records_continuous if twice else gate.min_records
    if gate.on != "pinned" and not split.heldout:
        message = "no verdict is ever possible: split.heldout = 0, which the track's first run fixed, holds nothing out"
        raise CannotTrain(message, 'set gate.on = "pinned", then pin records: dropforge submit --heldout FILE')
    scored = totals.scored
    known = attempt.spec.champion.drops if gate.on == "seen" else None
    judged = len({group for one, group in zip(scored, groups, strict=True) if known is None or one.drop in known})
    if judged >= needed:
        return None
    grouped, most = len(set(groups)), split.scored_records
    if most < needed or (len({one.prompt.unit for one in scored}) >= most and grouped < needed):
        raise CannotTrain(
            f"no verdict is ever possible: split.scored_records = {most} records count at most, {grouped} different "
            f"ones by now, and {'twice ' * twice}gate.min_records = {gate.min_records} are needed",
            "raise the former or lower the latter in dropforge.toml",
        )
    # Further rows of the same kind repeat each other, or ask about one document, as often.
    apart = max(1, grouped) / max(1, totals.heldout_prompts - totals.heldout_duplicates - totals.seen_by_champion)
    missing = needed - judged
    rows = (missing if gate.on == "pinned" else rows_for(missing, split.heldout)) / apart
    return Shortfall(heldout_rows=judged, needed_heldout_rows=needed, needed_rows=math.ceil(rows))


def _nothing_to_train(attempt: Attempt, totals: Totals, left_out: LeftOut, long: Sequence[str]) -> CannotTrain:
    if not any(drop.role == "train" for drop in attempt.spec.drops):
        return CannotTrain(
            "the snapshot holds held-out records only", "drop training data into the track's inbox folder"
        )
    reasons = {
        "held out": totals.heldout_rows,
        "with a prompt in the held-out set": totals.removed_heldout.total(),
        "duplicates": totals.duplicates,
        "near-duplicates of held-out records": totals.near_duplicates,
        "with special tokens of the base model's tokenizer": left_out.special_tokens,
        "longer than train.max_length": left_out.too_long,
    }
    found = ", ".join(f"{number:,} {why}" for why, number in reasons.items() if number)
    message = f"no training rows are left of {totals.rows + sum(left_out)}: {found}"
    return CannotTrain(
        "; ".join([message, *long, *contamination_warnings(totals, attempt.spec.drops)]),
        "drop more rows, and other ones than those that are held out",
    )
