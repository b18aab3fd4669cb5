"""Compare the candidate of a trial with that of its control, which has the champion's drops without the suspect."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline import durable
from pipeline.artifacts import Evaluation, TrialScores, Verdict
from pipeline.contract import Attempt
from pipeline.decide import statistics
from pipeline.decide.comparison import Comparison, compare
from pipeline.decide.slices import Known, judged_on


def score_trial(attempt: Attempt, records: Path, metric: str) -> TrialScores | None:
    """
    Return the scores of the trial that the run of `attempt` is the control of; `None` if no record is in both.

    `records` is the records.jsonl of the control. A record counts if it is of the same drop in both runs, as the
    suspect may have brought another reference for its prompt, and if the gate judges on it. Raises `StepFailed` if the
    answers were scored by different metrics.
    """
    published = attempt.spec.trial
    trial = Evaluation.model_validate(durable.read_json(attempt.root / published[Evaluation.step]))
    verdict = Verdict.model_validate(durable.read_json(attempt.root / published[Verdict.step]))
    own = {(line["id"], line["drop"]): line["candidate"] for line in durable.read_jsonl(records)}
    both = [
        {**line, "champion": own[line["id"], line["drop"]]}
        for line in durable.read_jsonl(attempt.root / trial.folder / records.name)
        if (line["id"], line["drop"]) in own
    ]
    if not both:
        return None
    # A model that is worse on all records together is compared on all: the drops that lost most are chosen by chance.
    lost = () if verdict.outcome == "worse" else verdict.lost_drops
    failed = {row.guard for row in verdict.guards if row.state == "failed"}
    by_nll = verdict.outcome != "worse" and "nll" in failed and "slice" not in failed
    found = compare_with_control(compare(metric, both), lost, attempt.config.gate.on, by_nll=by_nll)
    return found.model_copy(update={"lost_drops": verdict.lost_drops})


def compare_with_control(
    comparison: Comparison, lost: Sequence[int], on: str = "all", *, by_nll: bool = False
) -> TrialScores:
    """
    Test whether a trial's candidate is worse than its control's: the champion of `comparison` is the control's.

    Only records of the drops `lost` are compared, on which the trial's candidate lost against the champion; without
    any, all on which the gate judges by its setting `on`. The test is exact or corrected for skew, for a loss of the
    primary metric, or with `by_nll` for a rise of the references' negative log-likelihood per token.
    """
    judged = judged_on(on, Known(), comparison.drops, comparison.pinned)
    of_lost = judged & np.isin(comparison.drops, list(lost))
    part = comparison.part(of_lost if of_lost.any() else judged)
    differences = part.differences()
    if by_nll:
        sums, tokens = (part.sums(pair) for pair in part.nll)
        rises = sums[:, 0] / tokens[:, 0] - sums[:, 1] / tokens[:, 1]
        differences = -np.nan_to_num(rises, nan=1.0, posinf=1.0)
    wins, losses = statistics.count_signs(differences)
    p_value = statistics.one_sided_p(-differences)
    return TrialScores(groups=differences.size, wins=wins, losses=losses, p_value=p_value)
