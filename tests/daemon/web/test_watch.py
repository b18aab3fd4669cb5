"""A champion on watch as people see it: status, attention and page; the command and the button that go back."""

import html
import re
import shlex
from collections.abc import Callable

import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from daemon.state.database import transaction
from daemon.state.tables import Promotion, Track
from daemon.views.champion_history import ServingView
from daemon.views.overview import Overview
from tests.daemon.conftest import Ended, LivedIn
from tests.run_owner import add_drop, crown

WORDS = "generation 2 answered 11 of the last 11 new drops better than the champion"
COMMAND = f"dropforge rollback --track default --to 2 --reason '{WORDS}'"


def watched(lived_in: LivedIn, lost: int) -> None:
    """Let generation 3 serve, and lose so many drops to generation 2."""
    for generation, weights in ((1, "two"), (2, "three")):
        crown(lived_in.engine, lived_in.settings.work_folder, weights, generation)
    with transaction(lived_in.engine) as session:
        row = session.get_one(Track, "default")
        row.watch_former, row.watch_since = 2, 3
        for _ in range(lost):
            add_drop(session, watch_run=3, watch_points=-4.0)


def serving(lived_in: LivedIn) -> ServingView:
    (champion,) = Overview.of(lived_in.settings).champions(["default"])
    return champion


def test_below_the_limits_nobody_is_told_and_programs_read_the_numbers(
    lived_in: LivedIn, dropforge: Callable[..., Ended], person: TestClient
) -> None:
    watched(lived_in, 2)
    assert serving(lived_in).watch is not None
    assert "generation 2 answered" not in dropforge("status").out + dropforge("attention").out + person.get("/").text
    shown = " ".join(person.get("/tracks/default").text.split())
    assert "On watch for 1 night: generation 2 answered 2 of the last 2 new drops better" in shown
    assert shown.count("On watch") == 1, "only the champion that serves"
    (track, _) = dropforge("status", "--json").json["tracks"]
    assert track["champion"]["watch"] == {"former": 2, "nights": 1, "evidence": 7 / 6, "worse": 2, "better": 0}


@pytest.mark.parametrize(
    ("lost", "following"), [(8, "a return is proposed at evidence 100"), (11, f"to let it serve again: {COMMAND}")]
)
def test_status_attention_and_page_say_it(
    lived_in: LivedIn, dropforge: Callable[..., Ended], person: TestClient, lost: int, following: str
) -> None:
    watched(lived_in, lost)
    said = " ".join(dropforge("status").out.split())
    assert f"generation 2 answered {lost} of the last {lost} new drops better than the champion: evidence" in said
    assert following in said
    title = "Generation 2 of track default may be better than the champion"
    assert title in dropforge("attention").out
    shown = html.unescape(person.get("/").text)
    assert title in shown
    assert following in shown
    assert ("Return to generation 2" in shown) == (lost == 11)


def test_the_proposed_command_goes_back_with_the_evidence_as_its_reason(
    lived_in: LivedIn, dropforge: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.cli.handover.can_try", lambda: False)
    watched(lived_in, 11)
    (proposed,) = re.findall(r"dropforge rollback .*'", dropforge("status").out)
    done = dropforge(*shlex.split(proposed)[1:])
    assert done.code == 0, done.err
    assert (serving(lived_in).generation, serving(lived_in).watch) == (4, None)
    assert serving(lived_in).reason.endswith(WORDS)
    assert "generation 2 answered" not in dropforge("attention").out


def test_the_pages_button_goes_back_with_the_evidence_as_its_reason(
    lived_in: LivedIn, person: TestClient, visitor: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.web.actions.require_answer", lambda _folder: None)
    watched(lived_in, 11)
    assert "Return to generation 2" not in visitor.get("/").text
    form = re.search(
        r'<form method="post" action="(/tracks/default/rollback)">(.*?)</form>', person.get("/").text, re.DOTALL
    )
    assert form is not None
    fields = dict(re.findall(r'name="(\w+)" value="([^"]*)"', form[2]))
    assert fields == {"to": "2", "reason": WORDS}
    assert person.post(form[1], data=fields).status_code == 200
    with transaction(lived_in.engine) as session:
        change = session.exec(select(Promotion).where(Promotion.generation == 4)).one()
    assert (change.kind, change.restored, change.reason) == ("rollback", 2, WORDS)
    assert "Return to generation" not in person.get("/").text
