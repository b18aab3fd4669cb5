"""The verdict on too little data, before there is anything to compare."""

from pipeline.artifacts import Dataset, Shortfall, Verdict
from pipeline.config import GateConfig
from pipeline.gate.explain import short_line


def early_verdict(dataset: Dataset, shortfall: Shortfall, gate: GateConfig) -> Verdict:
    """Return the verdict for too little data: no model was trained for it, or one that there is nothing to ask."""
    have, need = shortfall.heldout_rows, shortfall.needed_heldout_rows
    unpinned = gate.on == "pinned" and not dataset.heldout_pinned
    reasons = {"no_pinned_heldout": unpinned, "too_few_records": have < need}
    verdict = Verdict(
        outcome="insufficient_evidence",
        reasons=tuple(code for code, holds in reasons.items() if holds),
        sentence="",
        metric=dataset.metric,
        records=have,
    )
    return verdict.model_copy(update={"sentence": short_line(verdict, need)})
