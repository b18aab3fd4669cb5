"""A verdict in one short line, as lists and the history show it; the report's story has the rest."""

from pipeline.artifacts import Verdict
from pipeline.wording import count, signed, span


def in_groups(verdict: Verdict) -> str:
    """Say how many groups the records are, where some are paraphrases of each other."""
    return "" if verdict.groups == verdict.records else f" in {count(verdict.groups, 'group')}"


def short_line(verdict: Verdict, needed_records: int) -> str:
    """Return the verdict with its gain and interval, as `promoted: +11.5 points (+5.9 to +16.9)`."""
    words = verdict.outcome.replace("_", " ")
    if verdict.outcome == "insufficient_evidence":
        if "no_pinned_heldout" in verdict.reasons:
            return f"{words}: no held-out set was dropped"
        have = count(verdict.records, "held-out record")
        if verdict.groups != verdict.records:
            have = f"{count(verdict.groups, 'different held-out record')} ({verdict.records:,} in all)"
        return f"{words}: {have}, and a verdict needs {needed_records:,}"
    failed = [guard.label for guard in verdict.guards if guard.state == "failed"]
    if verdict.outcome == "guard_failed" and failed:
        words += f" ({failed[0]}{f' and {len(failed) - 1} more' if failed[1:] else ''})"
    between = f" ({span(verdict.interval)})" if verdict.interval else ""
    return f"{words}: {signed(verdict.gain or 0.0)} points{between}"
