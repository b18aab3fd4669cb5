"""The preview step: the champion answers up to 100 new records of a drop, which are scored by the track's metric."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean

from pipeline.artifacts import Preview
from pipeline.contract import Attempt
from pipeline.errors import CannotTrain
from pipeline.evaluate.inference import Inference
from pipeline.evaluate.plan import EvaluatedModel, ModelRequests, engine_of, requests_to
from pipeline.metrics.registry import METRICS
from pipeline.models.generation import Decoding
from pipeline.models.loading import chosen_device
from pipeline.models.manifest import verify_manifest
from pipeline.models.placement import inference_quantization, prompts_at_once
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
    Let the champion answer up to 100 records of the attempt's last drop, and return its mean score on them, in points.

    The settings must name metric and answer length. Predictions are written to the new folder `predictions`. Raises
    `Interrupted` if stopped, `DropforgeError` if there is no new record, a drop or the champion is damaged, or memory
    does not suffice.
    """
    metric = attempt.config.evaluate.metric
    records, requests = _champion_requests(attempt, list(islice(_new_records(attempt), _MOST_RECORDS)))
    inference = Inference(attempt, requests)
    (answers,) = inference.run(attempt.make_folder("predictions"), [inference]).suites
    scores = METRICS[metric].scores([text for text, *_ in answers], [record.references for record in records])
    return Preview(records=len(records), points=100 * fmean(scores), metric=metric)


def _new_records(attempt: Attempt) -> Iterator[HeldoutRecord]:
    """
    Yield the last drop's records whose answers count by `prepare`'s rules, near-duplicates, too; one per prompt.

    They come in the order of their salted hashes: a random draw, which is the same each time. Rows with the tag
    `selected` are left out: they were chosen by a model's mistakes. Raises as `read_drops` and `fit_template` do.
    """
    config, drop = attempt.config, attempt.spec.drops[-1].id
    window = Window(Path(config.base_model), config.train.max_length)
    read = fit_template(read_drops(attempt, window), config, window)
    for prompt in group_prompts(read.rows, config.split, "prompt", pinned=config.gate.on == "pinned"):
        if rows := [row for row in prompt.rows if row.drop == drop and SELECTED not in row.tags]:
            more = {"drop": drop, "pinned": False, "tags": (), "near": (), "group": ""}
            line = row_line(rows[0], references=tuple(row.output for row in rows), **more)
            yield HeldoutRecord.model_validate(line)


def _champion_requests(attempt: Attempt, records: Sequence[HeldoutRecord]) -> tuple[list[HeldoutRecord], ModelRequests]:
    """
    Return the records that fit into the champion's window, and the requests for its answers to them, as a suite's.

    Raises `DropforgeError` if its files are damaged, `CannotTrain` if no record fits or its tokenizer or the settings'
    vLLM cannot be used, `StepFailed` if it does not fit on the GPU.
    """
    settings, champion = attempt.config.evaluate, attempt.spec.champion
    folder, device = attempt.path(champion.path), chosen_device()
    verify_manifest(folder)
    quantization = "none" if settings.vllm else inference_quantization(device, folder)
    model = EvaluatedModel("champion", champion.model_id, folder, quantization)
    decoding = Decoding(settings.max_new_tokens, settings.repetition_penalty, settings.batch_size)
    asked = requests_to(model, records, [], decoding, engine_of(settings.vllm))
    pairs = zip(records, asked.records, strict=True)
    kept = [(record, answer) for record, (it, answer) in pairs if len(it.tokens) + it.longest <= asked.window]
    if not kept:
        raise CannotTrain("no new record of the drop fits into the champion's window", "drop shorter records")
    asked = replace(asked, records=[], suites=[[answer for _, answer in kept]])
    size = settings.batch_size or prompts_at_once(device, quantization, asked.longest(), [folder])
    return [record for record, _ in kept], replace(asked, key=asked.key.model_copy(update={"batch_size": size}))
