"""The gate: from both models' scores on the same records to a verdict, its numbers and one sentence that says it."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import durable, statistics
from pipeline.artifacts import Dataset, Outcome, Report, Shortfall, Verdict
from pipeline.config import GateConfig
from pipeline.contract import Attempt
from pipeline.errors import StepFailed
from pipeline.metrics import METRICS, Metric
from pipeline.report import write_card
from pipeline.statistics import Floats

#: Largest p-value of a loss that counts as harm shown, whatever the gate asks of a gain.
HARM_P_VALUE = 0.01
POINTS = 100

_WORDS: dict[Outcome, str] = {
    "promoted": "promoted",
    "worse": "worse",
    "not_shown_better": "not shown better",
    "insufficient_evidence": "insufficient evidence",
    "guard_failed": "guard failed",
    "contaminated": "contaminated",
}


@dataclass(frozen=True)
class Paired:
    """Both models' scores on the same records."""

    metric: str
    scores: Mapping[str, tuple[float, float]]
    """Candidate's and champion's score, 0 to 1, by record id."""
    candidate_nll: float
    """The candidate's reference negative log-likelihood, nats a token."""


def decide(attempt: Attempt) -> Verdict:
    """
    Return the verdict on the run's candidate, its evidence card written.

    Raises `StepFailed` if the report does not belong to the dataset or lacks records.
    """
    verdict = _decide(attempt)
    return verdict.model_copy(update={"report": write_card(attempt, verdict)})


def _decide(attempt: Attempt) -> Verdict:
    """Return the verdict on the run's candidate; with a shortfall, the one that was known before any training."""
    dataset = attempt.load(Dataset)
    gate = attempt.config.gate
    pinned = gate.on == "all" or dataset.heldout_pinned
    if dataset.shortfall is not None and Report.step not in attempt.spec.inputs:
        early = _early(dataset, dataset.shortfall, pinned=pinned)
        champion = attempt.spec.champion
        return early.model_copy(
            update={"champion_generation": champion.generation, "champion_model_id": champion.model_id}
        )
    report = attempt.load(Report)
    if (report.metric, report.heldout_version) != (dataset.metric, dataset.heldout_version):
        message = "the report was made on another held-out set or with another metric than the dataset's"
        raise StepFailed(message, f"evaluate again: dropforge retry {attempt.spec.run} --from evaluate")
    verdict = judge(read_paired(attempt.path(report.folder), report), gate, heldout_pinned=pinned)
    return verdict.model_copy(
        update={
            "champion_generation": report.champion_generation,
            "candidate_model_id": report.candidate.model_id,
            "champion_model_id": report.champion.model_id,
        }
    )


def read_paired(folder: Path, report: Report) -> Paired:
    """Return the scores in the report's records.jsonl. Raises `StepFailed` if they are not the report's records."""
    scores = {
        line["id"]: (line["candidate"]["scores"][report.metric], line["champion"]["scores"][report.metric])
        for line in durable.read_jsonl(folder / "records.jsonl")
    }
    if len(scores) != report.records:
        message = f"the report speaks of {report.records} records and its file holds {len(scores)}"
        raise StepFailed(message, "evaluate again: dropforge retry RUN --from evaluate")
    return Paired(report.metric, scores, report.candidate.nll)


def judge(paired: Paired, gate: GateConfig, *, heldout_pinned: bool = True) -> Verdict:
    """
    Return the verdict on a candidate from paired scores: a pure function, the same for any order of the records.

    Promoted are a p-value and a mean gain within the gate's limits on enough records, with a finite likelihood.
    `worse` needs the mirrored test to show harm. `heldout_pinned` is false where the gate asks for a held-out set
    dropped by the user and there is none.
    """
    metric = METRICS[paired.metric]
    ids = sorted(paired.scores)
    pairs = np.array([paired.scores[record] for record in ids], dtype=np.float64).reshape(-1, 2)
    differences = (pairs[:, 0] - pairs[:, 1]) * (1 if metric.higher_is_better else -1)
    if not np.isfinite(differences).all():
        message = "a record's score is not a finite number"
        raise StepFailed(message, "evaluate again: dropforge retry RUN --from evaluate")
    seed = int.from_bytes(hashlib.sha256("\n".join(ids).encode()).digest()[:8])
    evidence = _measure(differences, metric, gate, seed)
    reasons = _reasons(evidence, gate, finite=math.isfinite(paired.candidate_nll), heldout_pinned=heldout_pinned)
    outcome = _outcome(reasons)
    means = pairs.mean(axis=0) * POINTS if ids else None
    verdict = Verdict(
        outcome=outcome,
        reasons=reasons,
        sentence="",
        metric=metric.name,
        records=len(ids),
        candidate_score=None if means is None else float(means[0]),
        champion_score=None if means is None else float(means[1]),
        gain=evidence.gain,
        interval=evidence.interval,
        p_value=evidence.p_value,
        test="sign flip and paired t" if metric.continuous else "exact McNemar",
        wins=evidence.wins,
        losses=evidence.losses,
        ties=len(ids) - evidence.wins - evidence.losses,
        smallest_detectable_gain=evidence.smallest_gain,
        records_needed=None if outcome == "promoted" else evidence.records_needed,
    )
    return verdict.model_copy(update={"sentence": _sentence(verdict, evidence, gate)})


@dataclass(frozen=True)
class _Evidence:
    """The numbers behind a verdict; gains in points."""

    records: int
    least_records: int
    gain: float
    interval: tuple[float, float]
    p_value: float
    harm_p_value: float
    wins: int
    losses: int
    smallest_gain: float | None
    records_needed: int | None


def _measure(differences: Floats, metric: Metric, gate: GateConfig, seed: int) -> _Evidence:
    continuous = metric.continuous
    least = gate.min_records_continuous if continuous else gate.min_records
    smallest = statistics.smallest_detectable_gain(
        differences, continuous=continuous, alpha=gate.alpha, min_gain=gate.min_gain / POINTS
    )
    needed = statistics.records_needed(
        differences, continuous=continuous, alpha=gate.alpha, min_gain=gate.min_gain / POINTS
    )
    low, high = statistics.interval(differences, seed)
    return _Evidence(
        records=differences.size,
        least_records=least,
        gain=float(differences.mean()) * POINTS if differences.size else 0.0,
        interval=(low * POINTS, high * POINTS),
        p_value=statistics.one_sided_p(differences, continuous=continuous, seed=seed),
        harm_p_value=statistics.one_sided_p(-differences, continuous=continuous, seed=seed),
        wins=int(np.count_nonzero(differences > 0)),
        losses=int(np.count_nonzero(differences < 0)),
        smallest_gain=None if smallest is None else smallest * POINTS,
        records_needed=None if needed is None else max(0, max(needed, least) - differences.size),
    )


def _reasons(evidence: _Evidence, gate: GateConfig, *, finite: bool, heldout_pinned: bool) -> tuple[str, ...]:
    """Return a code for each thing that stands against promotion."""
    against = {
        "no_pinned_heldout": not heldout_pinned,
        "too_few_records": evidence.records < evidence.least_records,
        "harm_shown": evidence.harm_p_value <= HARM_P_VALUE,
        "nll_not_finite": not finite,
        "p_above_limit": evidence.p_value > gate.alpha,
        # A mean of hundredths may miss its value in the last bits.
        "gain_below_minimum": evidence.gain < gate.min_gain - 1e-9,
    }
    return tuple(code for code, holds in against.items() if holds)


def _outcome(reasons: Sequence[str]) -> Outcome:
    """Return the verdict that the reasons amount to: whether anything can be said goes before what it is."""
    if not reasons:
        return "promoted"
    if "no_pinned_heldout" in reasons or "too_few_records" in reasons:
        return "insufficient_evidence"
    if "harm_shown" in reasons:
        return "worse"
    return "guard_failed" if "nll_not_finite" in reasons else "not_shown_better"


def _early(dataset: Dataset, shortfall: Shortfall, *, pinned: bool) -> Verdict:
    """Return the verdict for too little data: no model was trained for it."""
    have, need = shortfall.heldout_rows, shortfall.needed_heldout_rows
    facts = f"{_records(have)}, and a verdict by {METRICS[dataset.metric].title} needs {need}"
    if not pinned:
        facts, remedy = 'gate.on is "pinned"', f"drop at least {need} rows into the track's heldout folder"
    elif dataset.heldout_pinned:
        remedy = f"drop at least {need - have} more into the track's heldout folder"
    else:
        remedy = f"about {shortfall.needed_rows} more rows of the same kind would do"
    reasons = {"no_pinned_heldout": not pinned, "too_few_records": have < need}
    return Verdict(
        outcome="insufficient_evidence",
        reasons=tuple(code for code, holds in reasons.items() if holds),
        sentence=f"insufficient evidence, nothing was trained: {facts}; {remedy}",
        metric=dataset.metric,
        records=have,
    )


def _sentence(verdict: Verdict, evidence: _Evidence, gate: GateConfig) -> str:
    head = f"{_WORDS[verdict.outcome]}: "
    title = METRICS[verdict.metric].title
    if verdict.candidate_score is None or verdict.champion_score is None:
        return f"{head}no held-out records, and a verdict by {title} needs {evidence.least_records}"
    low, high = evidence.interval
    numbers = (
        f"{title} {verdict.candidate_score:.1f} against the champion's {verdict.champion_score:.1f} "
        f"on {_records(verdict.records)} (gain {evidence.gain:.1f} points, "
        f"{statistics.CONFIDENCE:.0%} interval {low:.1f} to {high:.1f}, {_p(evidence.p_value)}; "
        f"{verdict.wins} better, {verdict.losses} worse, {verdict.ties} equal)"
    ).replace("%", " %")
    why = _why(verdict, evidence, gate)
    return f"{head}{numbers}: {why}" if why else head + numbers


def _why(verdict: Verdict, evidence: _Evidence, gate: GateConfig) -> str:
    """Say in words what stood against promotion; nothing where nothing did."""
    if verdict.outcome == "worse":
        return f"a loss like this by chance has {_p(evidence.harm_p_value)}"
    words = {
        "no_pinned_heldout": 'gate.on is "pinned" and no held-out set was dropped',
        "too_few_records": f"a verdict needs {_records(evidence.least_records)}",
        "harm_shown": f"a loss like this by chance has {_p(evidence.harm_p_value)}",
        "nll_not_finite": "the candidate's likelihood of the references is not a finite number",
        "p_above_limit": f"{_p(evidence.p_value)} is above {gate.alpha:g}",
        "gain_below_minimum": f"a gain of {evidence.gain:.2f} is below {gate.min_gain:g}",
    }
    parts = [words[reason] for reason in verdict.reasons]
    if verdict.outcome == "not_shown_better" and verdict.records_needed:
        parts.append(f"about {verdict.records_needed} more held-out records would show this gain if it is real")
    return ", ".join(parts)


def _p(value: float) -> str:
    if value < 0.0001:  # noqa: PLR2004 - what four decimals can show
        return "p < 0.0001"
    return f"p = {value:.4f}" if value < 0.1 else f"p = {value:.2f}"  # noqa: PLR2004 - further digits say nothing


def _records(count: int) -> str:
    return f"{count} held-out record{'' if count == 1 else 's'}"
