"""Read the rows of a run's drops in the order of their prompts' hash, and choose each prompt's answers and split."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import durable
from pipeline.artifacts import Drop, Remark
from pipeline.config import SplitConfig, Unit
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.metrics.tokens import tokens
from pipeline.models.template import fold
from pipeline.models.tokenizer_files import Window, special_tokens
from pipeline.prepare.near_duplicates import LONG_RUN
from pipeline.records.heldout import hash_id, normalise, prompt_parts, split_hash
from pipeline.records.records import ANY_LENGTH, SELECTED, Finding, Record, read_records

SplitName = Literal["train", "dev", "heldout"]
#: Most prompts in which the common words, runs, answers and inputs are counted.
SAMPLE = 10_000
#: An input with more than this share of the prompts is no document.
MOST_OF_ONE = 1 / 50
#: Most texts of an opening with one exchange: a system message, question and answer.
_ONE_EXCHANGE = 3
#: Rows between two checks whether the step is to stop.
CHECK_EVERY = 1000
#: Rows of which the tokens are counted, to estimate how many exceed the window.
_COUNTED_ROWS = 1000
#: Longer texts are counted by their beginning.
_COUNTED_CHARACTERS = 20_000


class DropRow(NamedTuple):
    """One record that is not yet assigned to a split."""

    hash: str
    """Of salt and prompt, hexadecimal."""
    id: str
    pinned: bool
    order: int
    """Number of its drop among those that are read, the oldest 0."""
    number: int
    """Its number among the drop's records, from 0."""
    drop: int
    instruction: str
    input: str
    output: str
    tags: tuple[str, ...]
    group: str = ""
    """Hash of salt and the record's `group`, else of its conversation's opening; empty without either."""
    document: str = ""
    """Hash of salt and input, if that has at least 13 words; else empty."""
    accepted: bool = False
    """Whether its drop's new answers to the questions of earlier drops replace those."""
    elder: bool = False
    """Whether its drop is not among the run's: its answer counts, and the row itself is not used."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and text of the turns before its question."""
    begun: str = ""
    """The group of its conversation while that had one exchange, if it is another one now."""


class DropRows(NamedTuple):
    """The rows of all drops, and how many rows of the run's drops are left out, by reason."""

    rows: list[DropRow]
    """Sorted by their hash; per prompt pinned rows are first, then those of earlier drops."""
    too_long: int
    """Rows that certainly exceed the window."""
    special_tokens: int
    """Rows with special tokens of the base model's tokenizer."""
    lengths: list[int]
    """Tokens of up to 1,000 rows, left out or not; empty without a tokenizer.json."""
    refused: int = 0
    """Rows whose turns the base model's chat template refuses."""
    remarks: tuple[Remark, ...] = ()
    """What that template does with turns."""


def read_drops(attempt: Attempt, window: Window) -> DropRows:
    """
    Return the records of the attempt's drops and of its elders as rows, without those too long or with special tokens.

    Rows are sorted by hash, per prompt the pinned ones first, then by drop and number in it. Raises `CannotTrain` for a
    drop or tokenizer that cannot be read; `Interrupted` if stopped.
    """
    special = special_tokens(Path(attempt.config.base_model))
    holds_token = re.compile("|".join(map(re.escape, special))).search if special else None
    elders = {drop.id for drop in attempt.spec.elders}
    drops = sorted((*attempt.spec.drops, *attempt.spec.elders), key=lambda drop: drop.id)
    total = sum(drop.records for drop in drops)
    stride = max(1, math.ceil(total / _COUNTED_ROWS))
    rows: list[DropRow] = []
    lengths: list[int] = []
    done = too_long = spelled = 0
    attempt.progress(0, total, phase="reading")
    for order, drop in enumerate(drops):
        is_elder, exceeding = drop.id in elders, tuple[tuple[str, str], ...]()
        for number, record in enumerate(_records(attempt, drop)):
            earlier = [text for _, text in record.turns]
            texts = [*earlier, record.instruction, record.input, record.output]
            asked = fold(record.instruction, record.input)
            if done % stride == 0 and window.counts:
                lengths.append(_length("\n".join((*earlier, asked, record.output)), window))
            # The later records of a conversation have these turns, too.
            if exceeding and record.turns[: len(exceeding)] == exceeding:
                too_long += not is_elder
            elif window.is_exceeded(*texts):
                exceeding = (*record.turns, ("user", asked), ("assistant", record.output))
                too_long += not is_elder
            elif holds_token is not None and any(map(holds_token, texts)):
                spelled += not is_elder
            else:
                rows.append(_row(attempt.config.salt, record, drop, (order, number), elder=is_elder))
            done += 1
            if done % CHECK_EVERY == 0:
                attempt.check_stop()
                attempt.progress(done, total)
    rows.sort(key=lambda row: (row.hash, not row.pinned, row.order, row.number))
    return DropRows(rows, too_long, spelled, lengths)


def _row(salt: str, record: Record, drop: Drop, position: tuple[int, int], *, elder: bool) -> DropRow:
    """Return the row of a record of `drop`; `position` has its `order` and its `number`."""
    prompt = prompt_parts(record.turns, fold(record.instruction, record.input))
    texts, units = (record.instruction, record.input, record.output), _units(salt, record)
    begun = _conversation(salt, record.opening[:-2] if len(record.opening) > _ONE_EXCHANGE else ())
    row = DropRow(
        split_hash(salt, *prompt),
        hash_id(*prompt),
        drop.role == "heldout",
        *position,
        drop.id,
        *texts,
        record.tags,
        *units,
    )
    return row._replace(accepted=drop.answers_accepted, elder=elder, turns=record.turns, begun=begun)


def _length(text: str, window: Window) -> int:
    """Return about how many tokens a text has; its number of bytes if the window has at least as many tokens."""
    octets = len(text.encode())
    if octets <= window.tokens:
        return octets
    beginning = text[:_COUNTED_CHARACTERS]
    return round(window.count(beginning) * len(text) / len(beginning))


def _units(salt: str, record: Record) -> tuple[str, str]:
    """
    Return the hashes of a record's group and of its document, empty strings where it has none.

    Without a `group`, a conversation is one by its opening: the same however it goes on, and not of all that begin with
    "Hi". An input is a document from 13 words on: a shorter one (a label, a name, "noinput") has no run of words for
    which the rows that share it are left out of training.
    """
    words = tokens(record.input) if len(record.input) >= LONG_RUN else []
    group = split_hash(salt, "group", record.group) if record.group.strip() else _conversation(salt, record.opening)
    return group, split_hash(salt, "input", " ".join(words)) if len(words) >= LONG_RUN else ""


def _conversation(salt: str, opening: Sequence[str]) -> str:
    return split_hash(salt, "conversation", *map(normalise, opening)) if opening else ""


def _records(attempt: Attempt, drop: Drop) -> Iterator[Record]:
    attempt.check_stop()
    path, withdraw = attempt.path(drop.path), f"dropforge drops withdraw {drop.id} --reason"
    hint = f"drop the file again, or take it out: {withdraw} damaged"
    if not path.is_file():
        raise CannotTrain(f"drop {drop.id} ({drop.name}) is gone from the store: {drop.path}", hint)
    if durable.sha256_file(path) != drop.sha256:
        raise CannotTrain(f"drop {drop.id} ({drop.name}) is damaged: its sha256 is not the recorded one", hint)
    for record in read_records(path, ANY_LENGTH):
        if isinstance(record, Finding):
            message = f"drop {drop.id} ({drop.name}), line {record.line}: {record.message}"
            raise CannotTrain(message, f"take it out: {withdraw} 'bad row'")
        yield record


class Prompt(NamedTuple):
    """One prompt, its split and its rows."""

    split: SplitName
    unit: str
    """Hash of its group, its document or itself: prompts with the same one are on one side, and count as one."""
    removed: list[DropRow]
    """Training rows of a pinned prompt."""
    rows: list[DropRow] = []  # noqa: RUF012 - never changed
    """A row for each answer that counts; the first one is scored."""
    drops: tuple[int, ...] = ()
    """The run's drops with these answers and no others, the earliest first."""
    counts: DropRow | None = None
    """The first row whose answer counts, which the run may not use."""
    duplicates: int = 0
    """Rows that repeat an answer that counts."""
    replaced: Sequence[DropRow] = ()
    """Rows with other answers, which counted until a person accepted those of a later drop; the earliest first."""
    proposed: Sequence[DropRow] = ()
    """Rows of later drops with other answers, which no person accepted."""


def choose_unit(rows: Iterable[DropRow]) -> Unit:
    """
    Return "document" if all prompts with the same long input are to be on one side of the split, else "prompt".

    It is "prompt" if one long input has more than a fiftieth of the first 10,000 prompts: then it belongs to the task,
    and a few such units would not give the shares of the settings. `rows` must be sorted as by `read_drops`.
    """
    firsts = (next(same) for _, same in groupby(rows, key=lambda row: row.hash))
    counts = Counter(row.document for row in islice(firsts, SAMPLE))
    most = counts.total() * MOST_OF_ONE
    return "prompt" if any(count > most for document, count in counts.items() if document) else "document"


def group_prompts(rows: Iterable[DropRow], split: SplitConfig, unit: Unit, *, pinned: bool) -> Iterator[Prompt]:
    """
    Group sorted rows into prompts and yield each with its split and its current answers, in the order of their hash.

    With `pinned` only the prompts of held-out drops are held out. Without, a prompt's split depends on the hash of its
    unit alone, and the rows of held-out drops are not used; they only keep their prompts out of train and dev: else the
    drop's author would choose the evaluation set. Any other prompt is trained on if its earliest row, or one whose
    answer counts, has the tag `selected`: it was chosen by what a champion answered. A prompt without remaining rows
    has the split "train". Its unit is that of its earliest drop, so that no later one moves it. `rows` must be sorted
    as by `read_drops`.
    """
    for digits, group in groupby(rows, key=lambda row: row.hash):
        everything = list(group)
        pinned_rows = [row for row in everything if row.pinned]
        others = everything[len(pinned_rows) :]
        first = (pinned_rows if pinned_rows and pinned else others or pinned_rows)[0]
        of = first.group or (first.document if unit == "document" else "") or digits
        answers = _answers(others) if others else {}
        deciding = first, *answers.get("rows", ()), answers.get("counts", first)
        is_selected = any(SELECTED in row.tags for row in deciding)
        chosen: SplitName = "train" if is_selected else _split_of(of, split, pinned=pinned)
        chosen = "heldout" if pinned_rows and pinned else chosen
        removed: list[DropRow] = []
        if pinned_rows and (pinned or chosen != "heldout"):
            removed, answers = others, _answers(pinned_rows) if pinned else {}
        yield Prompt(chosen if answers.get("rows") else "train", of, removed, **answers)


def _split_of(digits: str, split: SplitConfig, *, pinned: bool) -> SplitName:
    # 52 bits: exact as a float, and always below 1.
    u = int(digits[:13], 16) / 2**52
    if u < split.heldout:
        return "train" if pinned else "heldout"
    return "dev" if u < split.heldout + split.dev else "train"


def _answers(rows: list[DropRow]) -> dict[str, Any]:
    """
    Return the fields of a `Prompt` that follow from its `rows`, which must be in the order of their drops, not empty.

    The answers of its earliest drop count, in each spelling, or those of the latest drop with accepted answers that
    differ. Rows of other drops repeat one of these if the answers are equal when `normalise`d, else they are replaced
    (earlier drops) or proposed (later ones). Rows of elders are only in `counts`: if an elder's answers count, the
    run's first row with each of them is kept.
    """
    current: dict[str, DropRow] = {}
    for _, of_drop in groupby(rows, key=lambda row: row.order):
        brought = _each_once(of_drop)
        accepted = next(iter(brought.values())).accepted
        if not current or (accepted and brought.keys() != current.keys()):
            current = brought
    forms = {row.output: normalise(row.output) for row in rows}
    counting = {forms[output] for output in current}
    first = next(iter(current.values()))
    usable = [row for row in rows if not row.elder]
    repeats = [row for row in usable if forms[row.output] in counting]
    others = [row for row in usable if forms[row.output] not in counting]
    kept = list((_each_once(repeats, forms) if first.elder else current).values())
    changed = {row.drop for row in others}
    drops = {row.drop: None for row in repeats if row.order >= first.order and row.drop not in changed}
    return {
        "rows": kept,
        "drops": tuple(drops) or tuple(row.drop for row in kept[:1]),
        "counts": first,
        "duplicates": len(repeats) - len(kept),
        "replaced": [row for row in others if row.order < first.order],
        "proposed": [row for row in others if row.order > first.order],
    }


def _each_once(rows: Iterable[DropRow], forms: Mapping[str, str] | None = None) -> dict[str, DropRow]:
    """Map each answer, or its form in `forms`, to the first of the rows with it, in their order."""
    firsts: dict[str, DropRow] = {}
    for row in rows:
        firsts.setdefault(forms[row.output] if forms else row.output, row)
    return firsts
