"""The evaluate step: candidate and champion answer the same held-out records; every answer is scored and stored."""

from pipeline import durable
from pipeline.artifacts import RECORDS_NAME, Dataset, Evaluation
from pipeline.contract import Attempt
from pipeline.evaluate import prediction_cache, scoring
from pipeline.evaluate.inference import Inference
from pipeline.evaluate.plan import go_on_with_smaller_batches, make_plan
from pipeline.evaluate.suites import read_suites
from pipeline.models.generation import Decoding
from pipeline.models.loading import OutOfMemory
from pipeline.records.heldout import HeldoutRecord


def evaluate(attempt: Attempt) -> Evaluation:
    """
    Evaluate candidate and champion on the held-out records; return their scores.

    Scores and answers of each record are written to the report's records.jsonl. A base model that is no longer the
    champion is evaluated on the general suites, once. Answers in the prediction cache, or of an interrupted attempt,
    are reused. Other predictions are written to `predictions/<key>.jsonl`. Raises `Interrupted` if stopped,
    `StartAgain` if memory ran out and the next attempt uses smaller batches, `StepFailed` if memory does not suffice
    for one prompt or vLLM fails, `CannotTrain` if a likelihood is not finite, the
    models' setups differ, no record is left, a suite is invalid, or the base model was replaced.
    """
    dataset, settings = attempt.load(Dataset), attempt.config.evaluate
    suites = read_suites(settings.general, attempt.spec.run)
    folder = attempt.make_folder("predictions")
    decoding = Decoding(dataset.max_new_tokens, settings.repetition_penalty, settings.batch_size)
    rows = durable.read_jsonl(attempt.path(dataset.folder) / "heldout.jsonl")
    heldout = [HeldoutRecord.model_validate(row) for row in rows]
    plan = make_plan(attempt, heldout, suites, decoding, folder)
    records, (candidate, champion, *_) = plan.records, plan.models
    models = [Inference(attempt, requests) for requests in plan.models]
    try:
        results = [model.run(folder, models) for model in models]
    except OutOfMemory as error:
        go_on_with_smaller_batches(folder, candidate.key.setup.batch_size, error)
    lines = [scoring.score_answers(records, result, dataset.metric) for result in results[:2]]
    report = attempt.make_folder("report")
    scoring.write_records(report / RECORDS_NAME, records, *lines)
    setup = candidate.key.setup
    return Evaluation(
        folder=attempt.relative(report),
        metric=dataset.metric,
        heldout_version=dataset.heldout_version,
        records=len(records),
        records_too_long=plan.too_long,
        records_seen_by_champion=plan.seen_by_champion,
        records_seen_by_candidate=plan.seen_by_candidate,
        batch_size=setup.batch_size,
        quantization=candidate.model.quantization,
        suites=scoring.score_suites(report, suites, results, attempt.path(dataset.folder) / "train.jsonl"),
        former=scoring.score_former(attempt, report, records, candidate, dataset.metric),
        trial=scoring.score_trial(attempt, report / RECORDS_NAME, dataset.metric) if attempt.spec.trial else None,
        versions={
            **setup.versions,
            **({} if setup.engine == prediction_cache.PLAIN else {"engine": setup.engine}),
            "device": setup.device,
            "dtype": setup.dtype,
            "attention": setup.attention,
        },
        candidate=scoring.summarise(candidate, results[0], lines[0]),
        champion=scoring.summarise(champion, results[1], lines[1]),
        champion_generation=attempt.spec.champion.generation,
        prediction_keys={requests.key.model_id: requests.key.digest for requests in plan.models},
    )
