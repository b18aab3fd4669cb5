"""Write warnings about a data set that a person should know before trusting its verdict, each with a remedy."""

import math
from collections.abc import Iterator, Sequence

from pipeline.artifacts import Drop
from pipeline.contract import StepSpec
from pipeline.metrics import json_fields
from pipeline.models.token_counts import Window
from pipeline.prepare.decontaminate import HeldOut, Splits
from pipeline.prepare.sample import Selection
from pipeline.prepare.split import MOST_OF_ONE
from pipeline.words import count

#: A warning is given if more than this share of a split is left out.
LARGE_SHARE = 0.2
#: The same for training rows that share 13 words in a row with a held-out record.
LARGE_SHARE_OF_RUNS = 0.1
#: In fewer prompts a document may have more than its share.
_LEAST_SAMPLED = 1000
#: From this share of the rows on, too long ones are worth a warning.
_MANY_LONG = 0.1
#: The advised window fits this share of the rows: one row of a million tokens must not choose it.
_FITTED = 0.98
_STEP = 256


def data_warnings(spec: StepSpec, splits: Splits, selection: Selection, metric: str) -> tuple[str, ...]:
    """Return all warnings about a data set with the primary `metric`."""
    return (
        *_pinned(spec.drops, spec.config.gate.on),
        *_large_unit(splits.heldout),
        *_near_duplicates(splits, spec.config.split.similarity),
        *_groups(len({one.prompt.unit for one in selection.scored}), len(set(selection.groups))),
        *contamination_warnings(splits, spec.drops),
        *_seen(selection.seen),
        *_references(selection, metric),
    )


def long_rows(lengths: Sequence[int], total: int, window: Window) -> tuple[int, list[str]]:
    """
    Estimate by the `lengths` of some rows how many of all `total` exceed `window`.

    From a tenth on, a warning is added with a window that would fit. What a chat template adds to a row is not counted.
    """
    share = sum(length > window.tokens for length in lengths) / max(1, len(lengths))
    number = round(share * total)
    if share < _MANY_LONG:
        return number, []
    fits = math.ceil(sorted(lengths)[math.ceil(_FITTED * len(lengths)) - 1] / _STEP) * _STEP
    words = f"about {number:,} of {total:,} rows are longer than {window.tokens:,} tokens and left out whole: "
    if fits <= window.limit:
        return number, [f"{words}train.max_length = {fits} would fit {_FITTED:.0%} of all rows"]
    return number, [f"{words}the base model's window is {window.limit:,}: shorten them, or use another base model"]


def _pinned(drops: Sequence[Drop], on: str) -> Iterator[str]:
    pinned = [drop for drop in drops if drop.role == "heldout"]
    if on != "pinned" and pinned:
        names = " and ".join(f"{drop.rows:,} of {drop.name} (drop {drop.id})" for drop in pinned)
        yield (
            "pinned records only stay out of training, and nothing is judged on them, since gate.on is "
            f'"{on}": {names}; to judge on them and nothing else, set gate.on = "pinned"'
        )


def _large_unit(heldout: HeldOut) -> Iterator[str]:
    if heldout.largest_unit > MOST_OF_ONE * max(heldout.sampled, _LEAST_SAMPLED):
        yield (
            f'{heldout.largest_unit / heldout.sampled:.0%} of the prompts have one "group" or input, and are all on '
            "one side of the split: give each document or conversation a group of its own (kinds of rows are tags)"
        )


def _near_duplicates(splits: Splits, similarity: float) -> Iterator[str]:
    long_runs = sum(len(one.rows) for one in splits.left_out if one.rule == "ngram")
    others = splits.near_duplicates - long_runs
    train = len(splits.train) + len(splits.dev) + long_runs + others
    if long_runs > LARGE_SHARE_OF_RUNS * train:
        yield (
            f"{long_runs:,} of {train:,} training rows ({long_runs / train:.0%}) are left out because they have 13 "
            'words in a row in common with a held-out record: withdraw the drop, and drop it again with one "group" '
            "for all rows of a document or conversation"
        )
    if others > LARGE_SHARE * train:
        yield (
            f"{others:,} of {train:,} training rows ({others / train:.0%}) are left out as near-duplicates of a "
            "held-out record: drop rows that say new things, or, if the task's rows are similar by nature, raise "
            f"split.similarity ({similarity:g})"
        )
    heldout = len(splits.heldout.prompts)
    if splits.heldout_duplicates > LARGE_SHARE * heldout:
        yield (
            f"{splits.heldout_duplicates:,} of {heldout:,} held-out records are not scored because each "
            "is a near-duplicate of another one, and would count one case several times: hold out other cases"
        )


def _groups(units: int, groups: int) -> Iterator[str]:
    """Yield a warning if many of the scored documents and other records count as one with another."""
    if units - groups > LARGE_SHARE * units:
        yield (
            f"{units:,} held-out records or documents count as {groups:,}, since some ask the same in other words or "
            "have the same long answer: hold out other cases"
        )


def contamination_warnings(splits: Splits, drops: Sequence[Drop]) -> list[str]:
    """Return a warning for each drop of which more than 20 % of the rows are left out as their prompt is pinned."""
    removed = splits.removed
    return [
        f"{drop.name}: {removed[drop.id]:,} of {drop.rows:,} rows are held-out questions and not "
        f"trained on: if the file should not be there, dropforge drops withdraw {drop.id} --reason TEXT"
        for drop in drops
        if removed[drop.id] > LARGE_SHARE * drop.rows
    ]


def _seen(records: int) -> Iterator[str]:
    if records:
        are = "held-out record is", "held-out records are"
        yield (
            f"{count(records, *are)} not scored because the champion was trained on the same or a near-duplicate: hold "
            "out records that are in no training drop"
        )


def _references(selection: Selection, metric: str) -> Iterator[str]:
    """Yield a warning about references that field F1 cannot parse."""
    references = [row for one in selection.scored for row in one.prompt.rows] if metric == "json_f1" else []
    if bad := [(row.drop, row.number) for row in references if json_fields.parse(row.output) is None]:
        drop, number = min(bad)
        yield (
            f"{len(bad):,} of {len(references):,} held-out references are no JSON object or array, and an answer to "
            f"them scores 0 by field F1 unless it is the same text; the first is record {number + 1} of drop {drop}: "
            "correct these rows and drop the file again, withdraw the drop, or set evaluate.metric"
        )
