"""How many rows a track needs before anything is judged is said until its first verdict, wherever drops are listed."""

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from daemon.settings.model import Settings
from daemon.views.overview import Overview
from daemon.web.server import make_app
from tests import run_owner
from tests.daemon.conftest import lines

LONG = "200 where answers are JSON or longer than 5 words"
NONE = f"track support has 0 pinned records, and a verdict needs 100 records ({LONG})"


def told(lived_in: Any) -> dict[str, str]:
    return Overview.of(lived_in.settings).missing_rows(lived_in.settings)


def test_too_little_data_is_no_verdict(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    made.take("first.jsonl", lines("a", "b"))
    run_owner.finish(
        made.engine,
        made.claim(),
        run_owner.ending("insufficient_evidence"),
        made.tick(),
    )
    assert list(told(made)) == ["default", "support"]
    made.take("second.jsonl", lines("c"))
    run_owner.finish(made.engine, made.claim(), run_owner.ending("worse"), made.tick())
    assert list(told(made)) == ["support"]


def test_accepted_rows_are_counted(lived_in: Any) -> None:
    settings = Settings.model_validate({**lived_in.settings.model_dump(), "gate": {"on": "all"}})
    seen = Overview.of(lived_in.settings)
    fresh = f"track support has {{}} and a verdict needs 100 held-out records ({LONG}), "
    assert seen.missing_rows(settings)["support"].startswith(f"{fresh.format('0 rows,')}so about 780 rows (1,490): ")
    lived_in.take("first.jsonl", lines("a", "b"), track="support")
    lived_in.take("bad.jsonl", "x", track="support")
    short = "track support has 2 rows, and a verdict by exact_match needs 100 held-out records, so about 780 rows: "
    assert seen.missing_rows(settings)["support"].startswith(short), "each answer has one word"
    with lived_in.engine.begin() as base:
        base.exec_driver_sql("UPDATE track SET metric = 'rougeL' WHERE name = 'support'")
    known = "track support has 2 rows, and a verdict by rougeL needs 200 held-out records, so about 1,490 rows: "
    assert seen.missing_rows(settings)["support"].startswith(known), "the first run decided"


def test_a_file_that_is_not_dropped_yet_is_counted_by_check(
    new_workspace: Callable[[], Any], dropforge: Callable[..., Any], tmp_path: Path
) -> None:
    made = new_workspace()
    file = tmp_path / "new.jsonl"
    file.write_text(lines("a"))
    assert "warning: track default has 0 pinned records, and" in dropforge("check", str(file)).out
    (tmp_path / "dropforge.toml").write_text("[tracks.support]\n")
    file.write_text(lines(*(f"a longer answer of six words {number}" for number in range(19))))
    with_it = "/new.jsonl: warning: with this file, track default has {}, and a verdict by rougeL needs 200 held-out"
    assert with_it.format("19 rows") in dropforge("check", str(file)).out, "before anything is trained"
    made.take("first.jsonl", lines("a", "b"))
    assert with_it.format("21 rows") in dropforge("check", str(file)).out, "with the rows that are there"
    made.take("new.jsonl", file.read_text())
    assert with_it.format("21 rows") in dropforge("check", str(file)).out, "it is there now"
    assert "with this file" in dropforge("check", str(file), "--json").json["foreseen"][-1]
    run_owner.finish(made.engine, made.claim(), run_owner.ending("worse"), made.tick())
    assert "with this file" not in dropforge("check", str(file)).out, "it had a verdict"


def test_a_drops_page_says_what_its_track_lacks_as_of_now(new_workspace: Callable[[], Any]) -> None:
    made = new_workspace()
    made.take("exam.jsonl", lines("a", "b"), "heldout")
    page = TestClient(make_app(made.settings, "t" * 43), base_url="http://127.0.0.1:8765")
    needs = "track default has 2 pinned records, and a verdict by exact_match needs 100 records"
    assert html.unescape(page.get("/drops/1").text).count(needs) == 1
    made.take("first.jsonl", lines("c"))
    run_owner.finish(made.engine, made.claim(), run_owner.ending("worse"), made.tick())
    assert "and a verdict" not in page.get("/drops/1").text


def test_it_is_said_wherever_drops_are_listed(lived_in: Any, dropforge: Callable[..., Any]) -> None:
    for command in (("status",), ("drops",), ("drops", "--track", "support")):
        assert f"\n{NONE}" in f"\n{dropforge(*command).out}", command
    for other in (("--track", "default"), ("--state", "suspended")):
        assert NONE not in dropforge("drops", *other).out, "it is not what was asked for"
    tracks = dropforge("status", "--json").json["tracks"]
    assert [(one["lacks"] or "").startswith(NONE) for one in tracks] == [False, True]
    page = TestClient(make_app(lived_in.settings, "t" * 43), base_url="http://127.0.0.1:8765")
    for path in ("/", "/inbox", "/inbox?track=support"):
        assert NONE in html.unescape(page.get(path).text), path
    assert NONE not in html.unescape(page.get("/inbox?track=default").text), "it is not what was asked for"


def test_rows_that_are_never_held_out_are_not_counted_and_no_held_out_file_may_have_them(
    new_workspace: Callable[[], Any], dropforge: Callable[..., Any], tmp_path: Path
) -> None:
    """Those with the tag `selected`, which a model's answers chose."""
    made = new_workspace()
    (tmp_path / "dropforge.toml").write_text('[tracks.support]\n[intake]\non_bad_rows = "quarantine"\n')
    chosen = [json.dumps({"instruction": f"q{number}", "output": "a", "tags": ["selected"]}) for number in range(900)]
    file, words = tmp_path / "new.jsonl", "with this file, track default has {}, and a verdict by exact_match needs 100"
    file.write_text("\n".join([*chosen, lines("a")]))
    seen = dropforge("check", str(file))
    assert "901 rows = 901 records (900 rows tagged selected: never held out); it would be accepted" in seen.out
    assert words.format("1 row") in seen.out
    made.take("first.jsonl", file.read_text())
    assert words.format("1 row") in dropforge("check", str(file)).out, "it is there now"
    receipt = json.loads((made.settings.inbox_folder / "done" / "first.jsonl.receipt.json").read_text())
    assert receipt["account"].endswith("(900 rows tagged selected: never held out)")

    refused = dropforge("submit", "--heldout", str(file))
    fault = "900 rows have the tag selected, and the file is to be held out"
    assert (refused.code, f"{fault}; rows that were chosen" in refused.out) == (65, True)
    made.take("exam.jsonl", file.read_text(), "heldout")
    rejected = next((made.settings.inbox_folder / "rejected").rglob("exam.jsonl.errors.json"))
    (finding,) = json.loads(rejected.read_text())["findings"]
    assert (finding["line"], finding["field"], finding["message"]) == (1, "tags", fault)
