"""The preview step: the champion answers up to 100 new records of a drop, which are scored by the track's metric."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

from pipeline.artifacts import Preview
from pipeline.contract import Attempt
from pipeline.evaluate.inference import Inference
from pipeline.evaluate.plan import ask_champion
from pipeline.metrics.registry import METRICS
from pipeline.models.tokenizer_files import Window
from pipeline.prepare.sample import row_line
from pipeline.prepare.split import group_prompts, read_drops
from pipeline.prepare.warnings import fit_template
from pipeline.records.heldout import HeldoutRecord
from pipeline.records.records import SELECTED

#: The standard error of an exact match is 5 points at most.
_MOST_RECORDS = 100


def preview(attempt: Attempt) -> Preview:
    """
    Let the champion answer records of the last of the attempt's drops, and return its mean score on them.

    The settings must name metric and answer length. Raises `Interrupted` if stopped, `DropforgeError` if there is no
    new record, a drop or the champion is damaged, or memory does not suffice.
    """
    metric = attempt.config.evaluate.metric
    records, requests = ask_champion(attempt, list(islice(_new_records(attempt), _MOST_RECORDS)))
    inference = Inference(attempt, requests)
    (answers,) = inference.run(attempt.make_folder("predictions"), [inference]).suites
    scores = METRICS[metric].scores([text for text, *_ in answers], [record.references for record in records])
    return Preview(records=len(records), points=100 * fmean(scores), metric=metric)


def _new_records(attempt: Attempt) -> Iterator[HeldoutRecord]:
    """
    Yield the last drop's records that a run would use, by `prepare`'s rules, each with its answers.

    They come in the order of their salted hashes: a random draw, which is the same each time. Rows with the tag
    `selected` are left out: they were chosen by a model's mistakes.
    """
    config, drop = attempt.config, attempt.spec.drops[-1].id
    window = Window(Path(config.base_model), config.train.max_length)
    read = fit_template(read_drops(attempt, window), config, window)
    for prompt in group_prompts(read.rows, config.split, "prompt", pinned=config.gate.on == "pinned"):
        if rows := [row for row in prompt.rows if row.drop == drop and SELECTED not in row.tags]:
            more = {"drop": drop, "pinned": False, "tags": (), "near": (), "group": ""}
            line = row_line(rows[0], references=tuple(row.output for row in rows), **more)
            yield HeldoutRecord.model_validate(line)
