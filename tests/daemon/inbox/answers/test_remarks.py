"""What a track lacks for a verdict is said with the rows that it takes and the ways out; nothing where it has them."""

from typing import Any

import pytest

from daemon.inbox.answers.remarks import too_few
from daemon.settings.model import TrackSettings


def said(metric: str | None = None, rows: dict[str, int] | None = None, **values: Any) -> str | None:
    return too_few("support", TrackSettings.model_validate(values), metric, rows or {})


def test_the_rows_that_a_verdict_takes_are_named_with_both_ways_out() -> None:
    assert said("rougeL", {"train": 300}) == (
        "track support has 300 rows, and a verdict by rougeL needs 200 held-out records, so about 1,490 rows: "
        'a run with fewer may train nothing; drop more, or pin records of your own: gate.on = "pinned", '
        "then dropforge submit --heldout --track support FILE"
    )
    pinned = said("rougeL", gate={"on": "pinned"}) or ""
    assert pinned.endswith("may train nothing; pin more: dropforge submit --heldout --track support FILE")
    assert "a run with fewer may give no verdict" in (said("rougeL", gate={"approval": "manual"}) or "")
    assert "a verdict needs 200" in (said("rougeL", evaluate={"metric": "rougeL"}) or ""), "the settings say so"


@pytest.mark.parametrize(
    ("metric", "rows", "values", "told"),
    [
        ("exact_match", 775, {}, True),
        ("exact_match", 776, {}, False),
        (None, 1484, {}, True),
        ("exact_match", 462, {"split": {"heldout": 0.25}}, False),
    ],
)
def test_nothing_is_said_where_the_rows_will_do(
    metric: str | None, rows: int, values: dict[str, Any], *, told: bool
) -> None:
    assert (said(metric, {"train": rows, "heldout": 9999}, **values) is not None) == told
