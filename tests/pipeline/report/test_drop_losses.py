"""The champion's loss on each drop: a new one that lies far above the known ones stands out, and stops nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import durable
from pipeline.decide.comparison import Comparison, compare
from pipeline.decide.slices import Known, measure_drop_losses
from pipeline.report.write import write_report
from tests.records_made import yes_or_no

KNOWN = Known(frozenset({1, 2, 4}))


def asked(*nats: float, size: int = 20) -> Comparison:
    """Return records of drops 1, 2 and on, of which the champion has this loss; the candidate finds all alike."""
    lines = yes_or_no(0, 0, size * len(nats))
    for place, line in enumerate(lines):
        line["drop"] = 1 + place // size
        tokens = 1 + place % 7
        line["champion"].update(nll_sum=nats[place // size] * tokens, nll_tokens=tokens)
    return compare("exact_match", lines)


@pytest.mark.parametrize(
    ("new", "stands_out"),
    [(1.80, True), (1.47, True), (1.45, False), (1.30, False)],  # 1.41 and what 1.36 and 1.41 differ by
)
def test_a_new_drop_stands_out_above_what_the_known_ones_differ_by(new: float, stands_out: bool) -> None:
    found = measure_drop_losses(asked(1.36, 1.41, new, 1.38), KNOWN)
    assert [(one.drop, one.known) for one in found] == [(1, True), (2, True), (3, False), (4, True)]
    assert [one.nats for one in found] == pytest.approx([1.36, 1.41, new, 1.38])
    assert [one.stands_out for one in found] == [False, False, stands_out, False]


def test_a_known_drop_never_stands_out_and_two_known_drops_say_nothing_of_a_spread() -> None:
    assert not any(one.stands_out for one in measure_drop_losses(asked(1.0, 9.0), KNOWN))
    assert not any(one.stands_out for one in measure_drop_losses(asked(1.0, 1.0, 9.0), KNOWN))


def test_where_nothing_is_known_or_too_little_asked_nothing_is_said() -> None:
    found = asked(1.0, 1.1, 2.0)
    for known in (Known(None), Known(frozenset())):
        assert measure_drop_losses(found, known) == ()
    assert measure_drop_losses(replace(found, pinned=np.ones(60, dtype=np.bool_)), KNOWN) == ()
    assert measure_drop_losses(asked(1.0, 1.1, 2.0, size=9), KNOWN) == (), "too few records"
    broken = asked(1.0, 1.1, float("nan"))
    assert [one.drop for one in measure_drop_losses(broken, KNOWN)] == [1, 2]


def test_the_card_names_the_drop_that_stands_out(made_reports: Any, tmp_path: Path) -> None:
    attempt, verdict = made_reports.case(tmp_path, "not_shown_better")
    losses = measure_drop_losses(asked(1.36, 1.41, 1.80, 1.38), KNOWN)
    folder = tmp_path / write_report(attempt, verdict.model_copy(update={"champion_losses": losses}))
    words = " ".join(durable.read_json(folder / "report.json")["story"]["why"])
    assert (
        "Look at drop 3 (bewertungen_ü.jsonl): the champion finds its answers less likely than those of all drops that "
        "it knows, 1.80 nats per token compared with 1.36 to 1.41."
    ) in words
    assert "stands out" in (folder / "report.html").read_text(encoding="utf-8")
