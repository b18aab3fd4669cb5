"""The decide step: read both models' scores on the same records, and decide."""

import sys
from collections.abc import Mapping

from pipeline import durable
from pipeline.artifacts import Dataset, Evaluation, Judgement, Model, Settlement, Verdict
from pipeline.contract import Attempt, StepSpec
from pipeline.decide.comparison import DAMAGES, Comparison, pool, read_comparison
from pipeline.decide.slices import Known
from pipeline.decide.verdict import Rules, decide_verdict, early_verdict, settle
from pipeline.errors import StepFailed
from pipeline.records.heldout import version_of


def decide(attempt: Attempt) -> Verdict:
    """
    Return the verdict on the run's candidate; its evidence card is written by the caller.

    With too little data and no evaluation the verdict is `insufficient_evidence`. Raises `StepFailed` if an artifact is
    missing, if the evaluation is of another held-out set, metric or champion, or if its files are not complete; others
    of `DAMAGES` if they are damaged. Of another run's, damage is only written to standard error.
    """
    dataset, spec, gate = attempt.load(Dataset), attempt.spec, attempt.config.gate
    version, champion = dataset.heldout_version, spec.champion
    if dataset.shortfall is not None and Evaluation.step not in spec.inputs:
        made = attempt.load(Model).model_id if Model.step in spec.inputs else None
        verdict = early_verdict(dataset, dataset.shortfall, gate)
    else:
        evaluation = attempt.load(Evaluation)
        made = evaluation.candidate.model_id
        _require_same(evaluation, dataset, spec)
        judgement = attempt.load(Judgement) if Judgement.step in spec.inputs else None
        comparison = read_comparison(attempt.root, evaluation, judgement)
        # Without those that are too long to prompt, or that today's champion was trained on.
        version = version_of(comparison.ids)
        known = Known(champion.drops, {drop.id: drop.name for drop in spec.drops})
        rules = Rules(gate, attempt.config.guards, known, evaluation.records_seen_by_candidate)
        run = _evaluated(attempt, spec.blamed, evaluation)
        pooled = pool(comparison, run) if run is not None and not spec.trial else None
        verdict = decide_verdict(comparison, rules, pooled).model_copy(update={"unwatched": evaluation.unwatched})
        trial = _evaluated(attempt, spec.trial, evaluation) if evaluation.trial is not None else None
        if run is not None and trial is not None:
            settlement = _settle(attempt, trial, pool(trial, run, comparison), rules)
            verdict = verdict.model_copy(update={"settlement": settlement})
    return verdict.model_copy(
        update={
            "champion_generation": champion.generation,
            "champion_model_id": champion.model_id,
            "candidate_model_id": made,
            "uses": spec.uses,
            "same_set_uses": spec.judged_versions.get(version, 0),
            "heldout_version": version,
        }
    )


def _evaluated(attempt: Attempt, published: Mapping[str, str], this: Evaluation) -> Comparison | None:
    """
    Read the comparison of another run, by the artifacts in `published`.

    `None` if it has no evaluation, or one of another setup than `this`, or a damaged one, which goes to standard error.
    """
    if Evaluation.step not in published:
        return None
    try:
        report = Evaluation.model_validate(durable.read_json(attempt.path(published[Evaluation.step])))
        return read_comparison(attempt.root, report, None) if report.setup == this.setup else None
    except DAMAGES as error:
        sys.stderr.write(f"{published[Evaluation.step]}, or what it names, is damaged: {error!r}\n")
        return None


def _settle(attempt: Attempt, trial: Comparison, pooled: Comparison, rules: Rules) -> Settlement | None:
    """Return the `Settlement` of the trial before a control, as `settle` does; `None` if it met another champion."""
    spec = attempt.spec
    verdict = Verdict.model_validate(durable.read_json(attempt.path(spec.trial[Verdict.step])))
    return settle(verdict, trial, pooled, rules) if verdict.champion_generation == spec.champion.generation else None


def _require_same(evaluation: Evaluation, dataset: Dataset, spec: StepSpec) -> None:
    """
    Raise `StepFailed` if another held-out set, metric or champion was evaluated than the data set's and the spec's.

    Which records are new to the champion follows from the spec.
    """
    serving, hint = spec.champion, f"evaluate again: dropforge retry {spec.run} --from evaluate"
    if (evaluation.metric, evaluation.heldout_version) != (dataset.metric, dataset.heldout_version):
        raise StepFailed("another held-out set was evaluated than the data set's, or by another metric", hint)
    if not evaluation.is_against(serving):
        other = f"generation {evaluation.champion_generation} ({evaluation.champion.model_id[:12]})"
        today = f"generation {serving.generation} ({serving.model_id[:12]})"
        raise StepFailed(f"the candidate was compared with {other}, and {today} is the champion", hint)
