"""What is told of one candidate of a search: on the card, by `show`, in the train artifact."""

from typing import Any, Literal

from pipeline.described import Frozen
from pipeline.words import duration, listed, plain


class Candidate(Frozen):
    """One training among those of a search, or adapters that were combined, whatever became of it."""

    number: int
    """From 1, in the order in which they were made."""
    settings: dict[str, Any]
    """Those of [train] that were tried with it."""
    outcome: Literal["finished", "pruned", "failed"]
    """`pruned`: its dev loss was above the median of those before it, so it was ended early."""
    dev_score: float | None = None
    """What was chosen by, higher is better: in points, or of `nll` the mean log-likelihood in nats a token."""
    scored_by: str = ""
    """The track's metric, or `nll` where the dev rows are few; empty if it was not scored."""
    dev_loss: float | None = None
    """The last that was measured, in nats per token."""
    seconds: float
    tokens: int = 0
    """That it was trained on."""
    chosen: bool = False
    """Whether it is the one that was merged and judged."""
    why: str = ""
    """Why it is not, or what decided for it."""


def settings_words(settings: dict[str, Any]) -> str:
    """Return settings in one line, as "learning_rate 0.0004, rank 16"."""
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items())


def candidate_words(candidate: Candidate) -> str:
    """Return a candidate in one line."""
    tried = settings_words(candidate.settings) or "as the settings say"
    said = [f"{candidate.number}. {tried}: {candidate.outcome}"]
    if candidate.dev_score is not None and candidate.scored_by != "nll":
        said.append(f"{plain(candidate.dev_score)} points on the dev rows")
    if candidate.dev_loss is not None:
        said.append(f"dev loss {plain(candidate.dev_loss, 3)}")
    said.append(duration(candidate.seconds))
    words = ", ".join(said) + (", chosen" if candidate.chosen else "")
    return f"{words}; {candidate.why}" if candidate.why else words


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return listed([str(one) for one in value]) if isinstance(value, (tuple, list)) else str(value)
