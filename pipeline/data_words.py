"""Word what `prepare` says of a run's data: its start, the rows that it leaves out, and warnings."""

from collections.abc import Mapping

from pipeline.artifacts import Dataset, Remark
from pipeline.words import count, listed

#: The words of each warning, with a remedy, and of each reason to start from the base, by code.
REMARKS: Mapping[str, str] = {
    "long_rows": (
        "about {rows:,} of {total:,} records are longer than {window:,} tokens and left out whole: "
        "train.max_length = {fits} would fit {share:.0%} of all records"
    ),
    "rows_longer_than_base": (
        "about {rows:,} of {total:,} records are longer than {window:,} tokens and left out whole: the base model's "
        "window is {limit:,}: shorten them, or use another base model"
    ),
    "pinned_unused": (
        "pinned records only stay out of training, and nothing is judged on them, since gate.on is "
        '"{on}": {rows:,} of {name} (drop {drop}); to judge on them and nothing else, set gate.on = "pinned"'
    ),
    "large_unit": (
        '{share:.0%} of the prompts have one "group" or input, and are all on one side of the split: give each '
        "document or conversation a group of its own (kinds of rows are tags)"
    ),
    "long_runs": (
        "{rows:,} of {train:,} training records ({share:.0%}) are left out because they have 13 words in a row in "
        'common with a held-out record: withdraw the drop, and drop it again with one "group" for all rows of a '
        "document or conversation"
    ),
    "near_duplicates": (
        "{rows:,} of {train:,} training records ({share:.0%}) are left out as near-duplicates of a held-out record: "
        "drop rows that say new things, or, if the task's rows are similar by nature, raise split.similarity "
        "({similarity:g})"
    ),
    "heldout_duplicates": (
        "{records:,} of {heldout:,} held-out records are not scored because each is a near-duplicate of another one, "
        "and would count one case several times: hold out other cases"
    ),
    "groups": (
        "{units:,} held-out records or documents count as {groups:,}, since some ask the same in other words or have "
        "the same long answer: hold out other cases"
    ),
    "heldout_questions": (
        "{name}: {rows:,} of {total:,} records are held-out questions and not trained on: if the file should not be "
        "there, dropforge drops withdraw {drop} --reason TEXT"
    ),
    "seen_by_champion": (
        "the champion was trained on {records:,} of the held-out records or on near-duplicates, and nothing that it "
        "knows is scored: hold out records that are in no training drop"
    ),
    "references_no_json": (
        "{bad:,} of {references:,} held-out references are no JSON object or array, and an answer to them scores 0 by "
        "field F1 unless it is the same text; the first is record {record} of drop {drop}: correct these rows and drop "
        "the file again, withdraw the drop, or set evaluate.metric"
    ),
    "system_refused": (
        "the base model's chat template refuses system messages, and {rows:,} records with one are left out: drop them "
        'without it, or set train.format = "alpaca"'
    ),
    "system_left_out": (
        "the base model's chat template leaves system messages out: {rows:,} records are used without theirs"
    ),
    "answer_refused": (
        "the base model's chat template refuses earlier turns, and {rows:,} records with some are left out: set "
        'train.format = "alpaca", or use another base model'
    ),
    "answer_changed": (
        "the base model's chat template writes an earlier answer otherwise than the last one: {rows:,} records have "
        "earlier answers, and are used as the model will be served"
    ),
    "other_base": "the manifest of generation {generation} does not say that it was made from this base",
    "unknown_drops": "it is not known which drops generation {generation} was made from",
    "drops_gone": "generation {generation} was made from drops that this run is not made from: {drops}",
    "ten_trainings": (
        "generation {generation} is of {trainings} trainings in a row, and every tenth at least is from the base"
    ),
    "nothing_new": "no record is new to generation {generation}",
}


def warning_words(data: Dataset) -> list[str]:
    """Return the warnings about a data set, a sentence each, without a capital letter and a full stop."""
    return list(map(remark_words, data.warnings))


def remark_words(remark: Remark) -> str:
    """Return the words of a remark, as `no record is new to generation 3`."""
    return REMARKS[remark.code].format_map(remark.numbers)


def proposed_words(rows: int) -> str:
    """Say how many records have proposed answers, as `150 records bring new answers to old questions`."""
    return f"{count(rows, 'record brings', 'records bring')} new answers to old questions"


def start_words(data: Dataset) -> str:
    """Describe a start, as `from the champion of generation 3, on 9 new records and 2 of 8 old ones`."""
    general = f" and {count(data.general_rows, 'general one')} of Dropforge's" if data.general_rows else ""
    if data.start is None:
        why = f": {remark_words(data.from_base)}" if data.from_base else ""
        return f"from the base, on {count(data.train_rows, 'record')}{general}{why}"
    new = count(data.train_rows - data.replayed_rows, "new record")
    rows = f"{new} and {data.replayed_rows:,} of {count(data.old_rows, 'old one')}"
    return f"from the champion of generation {data.start.generation}, on {rows}{general}"


def left_out_words(data: Dataset) -> str:
    """List the records that a data set leaves out by reason, as `12 repeated records and 3 ...`; empty for none."""
    too_long = max(data.rows_too_long, data.rows_over_window)
    reasons = (
        (data.duplicates, "repeated record", ""),
        (data.replaced, "record with an answer that was replaced", "records with answers that were replaced"),
        (data.proposed, "record with a new answer to an old question", "records with new answers to old questions"),
        (too_long, "record longer than the window", "records longer than the window"),
        (data.near_duplicates, "near-duplicate of a held-out record", "near-duplicates of held-out records"),
        (data.heldout_duplicates, "near-duplicate among these", "near-duplicates among these"),
        (data.removed_heldout, "record with the prompt of a pinned record", "records with prompts of pinned records"),
        (data.rows_refused, "record that the chat template refuses", "records that the chat template refuses"),
        (data.rows_with_special_tokens, "record with a special token", "records with special tokens"),
    )
    return listed([count(number, *words) for number, *words in reasons if number])
