"""The evaluate step: candidate and champion answer the same held-out records; every answer is scored and stored."""

from pathlib import Path

from pipeline import durable
from pipeline.artifacts import RECORDS_NAME, Dataset, Evaluation
from pipeline.config import EvaluateConfig
from pipeline.contract import Attempt
from pipeline.evaluate import scoring
from pipeline.evaluate.inference import Inference, Result
from pipeline.evaluate.plan import EvalPlan, go_on_with_smaller_batches, make_plan
from pipeline.evaluate.prediction_cache import PLAIN, PredictionKey
from pipeline.evaluate.suites import read_suites
from pipeline.models.loading import OutOfMemory
from pipeline.records.heldout import HeldoutRecord


def evaluate(attempt: Attempt) -> Evaluation:
    """
    Evaluate candidate and champion on the held-out records; return their scores.

    Scores and answers of each record are written to the report's records.jsonl, predictions that are not in the cache
    to `predictions/<key>.jsonl`. A base model that is no longer the champion answers the general suites, once, and the
    former champion on watch the records of fresh drops. Raises `Interrupted` if stopped, `StartAgain` if memory ran out
    and the next attempt uses smaller batches, `StepFailed` if memory does not suffice for one prompt or vLLM fails,
    `CannotTrain` if a likelihood is not finite, the models' setups differ, no record is left, a suite is invalid, a
    model or vLLM cannot be loaded, or the base model was replaced.
    """
    dataset, watched = attempt.load(Dataset), attempt.spec.watched
    suites = read_suites(attempt.config.evaluate.general, attempt.spec.run)
    folder, data = attempt.make_folder("predictions"), attempt.path(dataset.folder)
    heldout = list(map(HeldoutRecord.model_validate, durable.read_jsonl(data / "heldout.jsonl")))
    plan = make_plan(attempt, heldout, suites, dataset.max_new_tokens, folder)
    records, (candidate, champion, *_) = plan.records, plan.models
    setup = _setup(candidate.key, dataset, attempt.config.evaluate)
    results = _infer(attempt, plan, folder)
    lines = [scoring.score_answers(records, result, dataset.metric) for result in results[:2]]
    report = attempt.make_folder("report")
    scoring.write_records(report / RECORDS_NAME, records, *lines)
    return Evaluation(
        folder=attempt.relative(report),
        metric=dataset.metric,
        setup=setup,
        heldout_version=dataset.heldout_version,
        **plan.counts,
        batch_size=candidate.key.batch_size,
        quantization=candidate.model.quantization,
        suites=scoring.score_suites(report, suites, results[:3], data / "train.jsonl"),
        former=scoring.score_former(attempt, report, records, candidate, dataset.metric),
        trial=scoring.score_trial(attempt, report / RECORDS_NAME, setup) if attempt.spec.trial else None,
        watched=watched.generation if watched else None,
        watch=scoring.score_watch(plan, results[-1], lines[1], dataset.metric),
        versions=_versions(candidate.key),
        candidate=scoring.summarise(candidate, results[0], lines[0]),
        champion=scoring.summarise(champion, results[1], lines[1]),
        champion_generation=attempt.spec.champion.generation,
        prediction_keys={requests.key.model_id: requests.key.digest for requests in plan.models},
    )


def _infer(attempt: Attempt, plan: EvalPlan, folder: Path) -> list[Result]:
    """
    Return the models' predictions, in the order of `plan.models`; computed ones are stored in `folder`.

    Raises `StartAgain` if memory ran out and smaller batches may help, and what `Inference.run` raises.
    """
    models = [Inference(attempt, requests) for requests in plan.models]
    try:
        return [model.run(folder, models) for model in models]
    except OutOfMemory as error:
        go_on_with_smaller_batches(folder, plan.models[0].key.batch_size, error)


def _setup(key: PredictionKey, dataset: Dataset, settings: EvaluateConfig) -> str:
    """
    Return a hash of the settings that must agree before two runs are compared.

    They are metric, answer length, prompt format, repetition penalty, kind of engine, precision, and the batch size in
    the settings. Devices (and the batches that fit on them), attention, threads and versions change the last bits only:
    with two kinds of GPU in a cluster, a trial might never find a control that it can be compared with.
    """
    decoding = [key.template, key.repetition_penalty, key.engine == PLAIN, key.dtype, settings.batch_size]
    return durable.sha256_json([dataset.metric, dataset.max_new_tokens, *decoding])


def _versions(key: PredictionKey) -> dict[str, str]:
    engine = {} if key.engine == PLAIN else {"engine": key.engine}
    return {**key.versions, **engine, "device": key.device, "dtype": key.dtype, "attention": key.attention}
