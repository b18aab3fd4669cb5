"""A verdict in one short line, as lists and the history show it; the report's story has the rest."""

from pipeline.artifacts import GuardResult, Verdict
from pipeline.decide.reasons import HARM_P_VALUE
from pipeline.words import count, listed, signed, span

#: What general questions are answered with instead of an answer, by `pipeline.metrics.collapse.KINDS`.
_INSTEAD = {
    "label": "a label of the training data",
    "empty": "nothing",
    "short": "far fewer words than the base model",
}


def in_groups(verdict: Verdict) -> str:
    """Say how many groups the records are, where some are paraphrases of each other."""
    return "" if verdict.groups == verdict.records else f" in {count(verdict.groups, 'group')}"


def short_line(verdict: Verdict, needed_records: int, needed_rows: int | None = None) -> str:
    """
    Return the verdict with its gain and interval, as `promoted: +11.5 points (+5.9 to +16.9)`.

    A verdict needs so many held-out records, which about `needed_rows` more rows bring; `None`: nobody said how many.
    """
    words = verdict.outcome.replace("_", " ")
    if verdict.outcome == "insufficient_evidence":
        if "no_pinned_heldout" in verdict.reasons:
            return f"{words}: no held-out set was dropped"
        have = count(verdict.records, "held-out record")
        if verdict.groups != verdict.records:
            have = f"{count(verdict.groups, 'different held-out record')} ({verdict.records:,} in all)"
        bring = "" if needed_rows is None else count(needed_rows, "more row brings", "more rows bring")
        return f"{words}: {have}, and a verdict needs {needed_records:,}{bring and f', which about {bring}'}"
    failed = [f"{guard.label} {change_words(guard)}".rstrip() for guard in verdict.guards if guard.state == "failed"]
    gain = f"{signed(verdict.gain or 0.0)} points"
    if verdict.outcome == "guard_failed" and failed:
        words += f" ({failed[0]}{f', and {len(failed) - 1} more' if failed[1:] else ''})"
        gain += " on the task"
    between = f" ({span(verdict.interval)})" if verdict.interval else ""
    return "; ".join([f"{words}: {gain}{between}", *collapse_words(verdict)])


def collapse_words(verdict: Verdict) -> list[str]:
    """Return what a candidate answers general questions with, where it is shown to have lost answers; else nothing."""
    said = []
    for guard in verdict.guards:
        if guard.guard == "collapse" and guard.p_value is not None and guard.p_value <= HARM_P_VALUE:
            parts = {_INSTEAD[kind]: f"{number:g}" for kind, number in guard.parts.items() if number}
            instead = listed([f"{words} ({number})" if len(parts) > 1 else words for words, number in parts.items()])
            said.append(f"answers {guard.candidate:g} of {guard.records} general questions with {instead}")
    return said


def change_words(guard: GuardResult) -> str:
    """Return a guard's change in its unit."""
    if guard.change is None:
        return ""
    return f"{signed(guard.change, digits(guard))} {guard.unit}"


def lost_most(guard: GuardResult) -> str:
    """Return the two categories of a suite that lost most, beginning with ", most in"; empty where none lost."""
    worst = sorted((change, name) for name, change in guard.parts.items() if change < 0)[:2]
    return f", most in {listed([f'{name} ({signed(change)})' for change, name in worst])}" if worst else ""


def digits(guard: GuardResult) -> int:
    """Return how many decimals a guard's numbers have."""
    return {"nats": 3, "records": 0}.get(guard.unit, 1)
