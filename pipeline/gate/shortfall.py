"""The verdict on too little data, before there is anything to compare."""

from pipeline.artifacts import Dataset, Shortfall, Verdict
from pipeline.config import GateConfig
from pipeline.gate.explain import records
from pipeline.metrics.registry import METRICS


def early_verdict(dataset: Dataset, shortfall: Shortfall, gate: GateConfig, *, trained: bool) -> Verdict:
    """Return the verdict for too little data: no model was trained for it, or one that there is nothing to ask."""
    pinned = gate.on != "pinned" or dataset.heldout_pinned
    have, need = shortfall.heldout_rows, shortfall.needed_heldout_rows
    facts = f"{records(have)}, and a verdict by {METRICS[dataset.metric].title} needs {need}"
    if left := dataset.seen_by_champion:
        are = "is" if left == 1 else "are"
        known = "the champion at the time of preparing was trained on, or on near copies of"
        facts = f"{facts} ({left} more that {known}, {are} left out)"
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
        sentence=f"insufficient evidence, nothing was {'asked' if trained else 'trained'}: {facts}; {remedy}",
        metric=dataset.metric,
        records=have,
    )
