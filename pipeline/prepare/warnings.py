"""
Find what a person should know of a data set before trusting its verdict; `pipeline.data_words` words it.

These are warnings, the rows whose answers are not used as another drop has another answer, some side by side, and what
the base model's template does with turns.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.artifacts import AnswerPair, Drop, Remark, Replacement
from pipeline.config import RunConfig
from pipeline.contract import StepSpec
from pipeline.metrics import json_fields
from pipeline.models.generation import load_template
from pipeline.models.template import shown_prompt
from pipeline.models.tokenizer_files import Window
from pipeline.prepare.decontaminate import Splits
from pipeline.prepare.sample import Selection
from pipeline.prepare.split import MOST_OF_ONE, DropRows, Prompt

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
#: Pairs of answers that are shown for one drop, and drops with pairs, the latest first.
_MOST_PAIRS, _MOST_DROPS = 20, 10


def data_warnings(spec: StepSpec, splits: Splits, selection: Selection, metric: str) -> tuple[Remark, ...]:
    """Return all warnings about a data set with the primary `metric`, but those of `long_rows` and `fit_template`."""
    gate, heldout, repeats = spec.config.gate, splits.heldout, splits.heldout_duplicates
    unused = [drop for drop in spec.drops if drop.role == "heldout" and gate.on != "pinned"]
    share = heldout.largest_unit / max(1, heldout.sampled)
    is_large = heldout.largest_unit > MOST_OF_ONE * max(heldout.sampled, _LEAST_SAMPLED)
    long_runs = sum(len(part.rows) for part in splits.left_out if part.rule == "ngram")
    similar = splits.near_duplicates - long_runs
    train = max(1, len(splits.train) + len(splits.dev) + splits.near_duplicates)
    runs = {"rows": long_runs, "train": train, "share": long_runs / train}
    near = {"rows": similar, "train": train, "share": similar / train, "similarity": spec.config.split.similarity}
    units, groups = len({part.prompt.unit for part in selection.scored}), len(set(selection.groups))
    return (
        *(Remark(code="pinned_unused", numbers={"on": gate.on, **_of_drop(drop, drop.records)}) for drop in unused),
        *_warning("large_unit", is_large, share=share),
        *_warning("long_runs", long_runs > LARGE_SHARE_OF_RUNS * train, **runs),
        *_warning("near_duplicates", similar > LARGE_SHARE * train, **near),
        *_warning(
            "heldout_duplicates",
            repeats > LARGE_SHARE * len(heldout.prompts),
            records=repeats,
            heldout=len(heldout.prompts),
        ),
        # Many of the scored documents and other records count as one with another.
        *_warning("groups", units - groups > LARGE_SHARE * units, units=units, groups=groups),
        *contamination_warnings(splits, spec.drops),
        *_warning("seen_by_champion", selection.seen > 0, records=selection.seen),
        *(_references(selection) if metric == "json_f1" else []),
    )


def _warning(code: str, holds: bool, **numbers: float | str) -> list[Remark]:  # noqa: FBT001
    return [Remark(code=code, numbers=numbers)] if holds else []


def _of_drop(drop: Drop, rows: int) -> dict[str, int | float | str]:
    return {"drop": drop.id, "name": drop.name, "rows": rows, "total": drop.records}


def long_rows(lengths: Sequence[int], total: int, window: Window) -> tuple[int, list[Remark]]:
    """
    Return about how many of `total` rows exceed `window`, by the `lengths` of some in tokens, and one warning or none.

    The warning is given from a tenth of the rows on: with a window that fits 98 % of them, or with the base's window if
    that is smaller. What a chat template adds to a row is not counted.
    """
    share = sum(length > window.tokens for length in lengths) / max(1, len(lengths))
    number = round(share * total)
    if share < _MANY_LONG:
        return number, []
    fits = math.ceil(sorted(lengths)[math.ceil(_FITTED * len(lengths)) - 1] / _STEP) * _STEP
    facts = {"rows": number, "total": total, "window": window.tokens}
    if fits <= window.limit:
        return number, _warning("long_rows", True, **facts, fits=fits, share=_FITTED)  # noqa: FBT003
    return number, _warning("rows_longer_than_base", True, **facts, limit=window.limit)  # noqa: FBT003


def contamination_warnings(splits: Splits, drops: Sequence[Drop]) -> list[Remark]:
    """Return a warning for each drop of which more than 20 % of the rows are left out as their prompt is pinned."""
    removed = splits.removed
    return [
        Remark(code="heldout_questions", numbers=_of_drop(drop, removed[drop.id]))
        for drop in drops
        if removed[drop.id] > LARGE_SHARE * drop.records
    ]


def _references(selection: Selection) -> list[Remark]:
    """Return a warning about references that field F1 cannot parse, or none."""
    references = [row for record in selection.scored for row in record.prompt.rows]
    bad = [(row.drop, row.number) for row in references if json_fields.parse(row.output) is None]
    drop, number = min(bad, default=(0, 0))
    numbers = {"bad": len(bad), "references": len(references), "record": number + 1, "drop": drop}
    return _warning("references_no_json", bool(bad), **numbers)


def counts_by_drops(prompts: Iterable[Prompt]) -> tuple[tuple[Replacement, ...], tuple[Replacement, ...]]:
    """Return the numbers of replaced rows and of rows with proposed answers, each sorted by older and newer drop."""
    replaced, proposed = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for prompt in prompts:
        if prompt.counts is not None:
            replaced.update((row.drop, prompt.counts.drop) for row in prompt.replaced)
            proposed.update((prompt.counts.drop, row.drop) for row in prompt.proposed)
    return _listed(replaced), _listed(proposed)


def _listed(pairs: Counter[tuple[int, int]]) -> tuple[Replacement, ...]:
    return tuple(Replacement(old=old, new=new, rows=rows) for (old, new), rows in sorted(pairs.items()))


def proposed_answers(prompts: Iterable[Prompt]) -> tuple[AnswerPair, ...]:
    """Return proposed answers with those that count, the latest drop first: up to 20 per drop, of up to 10 drops."""
    pairs: dict[int, list[AnswerPair]] = {}
    for old, row in ((prompt.counts, row) for prompt in prompts for row in prompt.proposed):
        of_drop = pairs.setdefault(row.drop, [])
        if old is not None and len(of_drop) < _MOST_PAIRS:
            texts = {
                "old_prompt": shown_prompt(old.instruction, old.input, old.turns),
                "old_answer": old.output,
                "new_answer": row.output,
            }
            of_drop.append(AnswerPair(old_drop=old.drop, new_drop=row.drop, **texts))
    return tuple(pair for drop in sorted(pairs, reverse=True)[:_MOST_DROPS] for pair in pairs[drop])


def fit_template(read: DropRows, config: RunConfig, window: Window) -> DropRows:
    """
    Return `read` without the rows that the base model's template refuses, with their number and remarks on turns.

    `read` itself is returned without turns, a tokenizer.json or the training stack. Raises `CannotTrain` if the
    template cannot be used at all.
    """
    rows = [row for row in read.rows if row.turns]
    if not rows or not window.counts:
        return read
    try:
        treatment = load_template(Path(config.base_model), config.train.format).treatment()
    except ModuleNotFoundError:
        return read
    told = {row for row in rows if row.turns[0][0] == "system"}
    answered = {row for row in rows if row.turns[-1][0] == "assistant"}
    found = {f"system_{treatment.system}": told, f"answer_{treatment.answer}": answered}
    lost = set().union(*(some for code, some in found.items() if code.endswith("refused")))
    remarks = (
        Remark(code=code.replace(" ", "_"), numbers={"rows": number})
        for code, some in found.items()
        if not code.endswith("written") and (number := sum(not row.elder for row in some))
    )
    kept = [row for row in read.rows if row not in lost] if lost else read.rows
    return read._replace(rows=kept, refused=sum(not row.elder for row in lost), remarks=tuple(remarks))
