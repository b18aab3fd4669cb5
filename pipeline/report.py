"""The evidence card of a run: report.json and report.html."""

from pipeline.artifacts import Verdict
from pipeline.contract import Attempt


def write_card(attempt: Attempt, verdict: Verdict) -> str | None:
    """Write the card into the attempt and return its folder, relative to the state folder; not built yet."""
    del attempt, verdict
    return None
