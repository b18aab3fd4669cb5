"""How likely the champion finds the answers of each drop: wrong data in a new drop often shows there at once."""

import numpy as np

from pipeline.artifacts import DropLoss
from pipeline.decide.comparison import Comparison
from pipeline.decide.slices import Known

#: A mean over fewer held-out records says nothing of its drop.
_LEAST = 10
#: Of fewer known drops the spread says little: with two, one honest drop of six would stand out.
_LEAST_KNOWN = 3


def measure_drop_losses(comparison: Comparison, known: Known) -> tuple[DropLoss, ...]:
    """
    Return the champion's negative log-likelihood a token on the held-out records of each drop, by the drops' numbers.

    On held-out records, which no model was trained on: known drops and new ones are asked alike. A new drop stands out
    if it lies above the known ones by more than these, three or more, differ among each other. Nothing for a base
    model, which knows no drop.
    """
    if not known.drops:
        return ()
    sums, tokens = (columns[:, 1] for columns in comparison.nll)
    found = []
    for drop in np.unique(comparison.drops).tolist():
        mask = (comparison.drops == drop) & ~comparison.pinned
        if mask.sum() >= _LEAST and np.isfinite(sums[mask]).all():
            nats = float(sums[mask].sum() / tokens[mask].sum())
            found.append(DropLoss(drop=drop, nats=nats, known=drop in known.drops))
    old = [one.nats for one in found if one.known]
    most = 2 * max(old) - min(old) if len(old) >= _LEAST_KNOWN else float("inf")
    return tuple(one.model_copy(update={"stands_out": not one.known and one.nats > most}) for one in found)
