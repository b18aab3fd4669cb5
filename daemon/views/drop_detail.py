"""All details of a drop: its rows, its findings, and the champions that were trained on it."""

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

from daemon.state.questions import TAKEN_IN
from daemon.views.drops import DropView
from daemon.views.overview import Overview
from pipeline.artifacts import Frozen
from pipeline.records.records import Row, read_rows

#: Most rows of one page, and most characters of a row's text.
MOST_ROWS = 20
MOST_CHARACTERS = 2000
#: Most champions that are listed.
_MOST_CHAMPIONS = 20


class FindingView(Frozen):
    """A kind of error or warning about a drop's rows."""

    message: str
    remedy: str = ""
    rows: int
    line: int | None = None
    """Number of the first affected line."""


class DropRow(Frozen):
    """A row of a drop; each text is cut after `MOST_CHARACTERS`."""

    line: int
    instruction: str
    input: str
    output: str
    tags: tuple[str, ...] = ()
    cut: bool = False


class DropDetail(Frozen):
    """All details of one drop except its rows."""

    drop: DropView
    by: str | None
    """Name of the user who dropped the file; `None` if unknown."""
    findings: tuple[FindingView, ...]
    warnings: tuple[FindingView, ...]
    champions: tuple[int, ...]
    """Generations of the track's champions that were trained on it, without rollbacks, the latest first; at most 20."""
    serving: bool
    """Whether the current champion was trained on it."""


def drop_detail(overview: Overview, drop_id: int) -> DropDetail:
    """Return all details of a drop except its rows. Raises `NotThere` if there is no such drop."""
    drop = overview.drop(drop_id)
    detail = _taken_in(overview, drop_id)
    champions = _champions(overview, drop)
    serving = overview.champion(drop.track)
    return DropDetail(
        drop=drop,
        by=overview.rows('SELECT owner FROM "drop" WHERE id = ?', drop_id)[0].owner,
        findings=_findings(detail.get("kinds")),
        # Whether the track's rows are too few changes: pages say it as of now.
        warnings=_findings(one for one in detail.get("warnings") or () if one["kind"] != "too_few_rows"),
        champions=champions,
        serving=serving is not None and drop.id in {one.id for one in serving.data if one.role == "train"},
    )


def come_to(overview: Overview, drops: Iterable[DropView]) -> dict[int, str]:
    """Map the id of each run that was the first of a drop in `drops` to its outcome, or to its state if it has none."""
    wanted = json.dumps([drop.first_run for drop in drops if drop.first_run is not None])
    found = overview.rows("SELECT id, state, outcome FROM run WHERE id IN (SELECT value FROM json_each(?))", wanted)
    return {row.id: row.outcome or row.state for row in found}


def findings_of(overview: Overview, drop_id: int) -> tuple[FindingView, ...]:
    """Return at most 20 kinds of the first 1,000 errors found in a drop's rows at intake, rarest first; maybe none."""
    return _findings(_taken_in(overview, drop_id).get("kinds"))


def drop_rows(overview: Overview, drop: DropView, after: int = 0, most: int = MOST_ROWS) -> tuple[DropRow, ...]:
    """
    Return up to `most` stored rows of a drop after the first `after`; empty if its file was not kept.

    Lines that are not JSON objects are skipped and not counted; each text is cut after 2,000 characters.
    """
    path = overview.folder / "drops" / f"{drop.sha256}.jsonl"
    if not drop.sha256 or not path.is_file():
        return ()
    rows = (row for row in read_rows(path) if isinstance(row, Row) and isinstance(row.value, dict))
    return tuple(_row(row) for row in islice(rows, after, after + most))


def _taken_in(overview: Overview, drop_id: int) -> dict[str, Any]:
    """Return the detail of the event that recorded the drop; empty if there is none."""
    return next((row.detail for row in overview.rows(TAKEN_IN, drop=drop_id)), {})


def _findings(noted: Iterable[dict[str, Any]] | None) -> tuple[FindingView, ...]:
    return tuple(
        FindingView.model_validate({name: one[name] for name in FindingView.model_fields if name in one})
        for one in noted or ()
    )


def _row(row: Row) -> DropRow:
    texts = {name: _text(row.value.get(name, "")) for name in ("instruction", "input", "output")}
    tags = row.value.get("tags")
    return DropRow(
        line=row.line,
        **{name: text[:MOST_CHARACTERS] for name, text in texts.items()},
        tags=tuple(map(_text, tags)) if isinstance(tags, list) else (),
        cut=any(len(text) > MOST_CHARACTERS for text in texts.values()),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _champions(overview: Overview, drop: DropView) -> tuple[int, ...]:
    if drop.role != "train":
        return ()  # nothing is trained on it
    with_it = (
        "SELECT DISTINCT generation FROM promotion, json_each(promotion.drops) AS held WHERE track = ? "
        "AND held.value = ? ORDER BY generation DESC LIMIT ?"
    )
    return tuple(row.generation for row in overview.rows(with_it, drop.track, drop.id, _MOST_CHAMPIONS))
