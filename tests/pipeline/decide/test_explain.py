"""The verdict in a few clauses: what it is, the gain and its interval, what else a person should know."""

from typing import Any

import pytest

from pipeline.artifacts import GuardResult, Verdict
from pipeline.decide.explain import brief, clauses, sentence

SMALL = "; not guarded: 13 small drops or tags"


def line(verdict: Verdict, **changes: Any) -> str:
    """Return the verdict in one line, as its run's row has it."""
    row = brief(verdict.model_copy(update=changes))
    return sentence(clauses(Verdict.model_validate(row)))


@pytest.mark.parametrize(
    ("outcome", "changes", "said"),
    [
        ("promoted", {"gain": 6.5, "interval": (0.91, 12)}, "promoted: +6.5 points (+0.9 to +12.0)"),
        ("worse", {"gain": -13.0, "interval": (-18.6, -7.6)}, "worse: −13.0 points (−18.6 to −7.6)"),
        ("not_shown_better", {"gain": 0.01, "interval": (-3, 3)}, "not shown better: 0.0 points (−3.0 to +3.0)"),
        (
            "guard_failed",
            {"gain": 7, "interval": None},
            "guard failed (suite builtin −27.6 points): +7.0 points on the task",
        ),
        ("contaminated", {"gain": 39.5, "interval": (1, 70)}, "contaminated: +39.5 points (+1.0 to +70.0)"),
    ],
)
def test_a_line_has_verdict_gain_and_interval(
    made_reports: Any, outcome: str, changes: dict[str, Any], said: str
) -> None:
    verdict = made_reports.verdict(outcome, made_reports.rows(5, 5, 5), **changes)
    assert line(verdict) == f"{said}{SMALL}"


def test_a_former_champion_on_watch_that_cannot_be_compared_is_named(made_reports: Any) -> None:
    verdict = made_reports.verdict("worse", made_reports.rows(5, 5, 5), gain=-7.0, interval=None)
    said = "generation 2, on watch, cannot be compared: it is damaged, or prompted in another way"
    assert line(verdict, unwatched=2) == f"worse: −7.0 points{SMALL}; {said}"


def test_a_second_guard_that_failed_is_counted(made_reports: Any) -> None:
    rows = made_reports.rows(5, 5, 5)
    verdict = made_reports.verdict("guard_failed", rows, gain=7.0, interval=None)
    nll = GuardResult(guard="nll", unit="nats", change=0.2, margin=0.1, state="failed")
    both = verdict.model_copy(update={"guards": (*verdict.guards, nll)})
    said = "guard failed (suite builtin −27.6 points, and 1 more): +7.0 points on the task"
    assert line(both) == f"{said}{SMALL}"


def test_too_little_data_says_how_much_there_is_and_is_needed(made_reports: Any) -> None:
    _, verdict = made_reports.early()
    said = "insufficient evidence: 31 held-out records, and a verdict needs"
    assert line(verdict) == f"{said} 100"
    assert line(verdict, groups_needed=32, rows_needed=1) == f"{said} 32, which about 1 more row brings"
