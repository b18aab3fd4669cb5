"""The evidence card in a real browser: nothing overflows, everything can be read, nothing is loaded or run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.write import write_report

CARDS = ["promoted", "worse", "not_shown_better", "guard_failed", "contaminated", "early", "hostile"]
SCREENS = [(1280, "light"), (400, "dark")]
Open = Callable[..., None]

#: Texts whose colour stands out too little from what lies behind them (WCAG 2.2, 1.4.3).
_FAINT = """
const done = arguments[0];
axe.run(document, {runOnly: ["color-contrast"]}).then((found) => done([found.passes.length, found.violations]));
"""
#: Boxes that are wider than the room they have; a table may be, it scrolls in itself.
_WIDE = """
const page = document.documentElement;
const wide = [...document.body.querySelectorAll("*")].filter((element) =>
  !element.closest(".scroll") && !element.closest("svg") && !element.closest(".preview")
  && element.getBoundingClientRect().right > page.clientWidth + 0.5).map((element) => element.outerHTML.slice(0, 120));
return [page.scrollWidth, page.clientWidth, window.innerWidth, wide];
"""


@pytest.fixture(scope="session")
def pages(made_reports: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a card of each kind."""
    found = {}
    for name in CARDS:
        root = tmp_path_factory.mktemp(name)
        change = [made_reports.hostile] if name == "hostile" else []
        attempt, verdict = made_reports.case(root, name.replace("hostile", "not_shown_better"), *change)
        found[name] = root / write_report(attempt, verdict) / "report.html"
    return found


@pytest.fixture
def open_page(chromium: Any, pages: dict[str, Path]) -> Open:
    """Return a function that opens a card on a screen, with every part unfolded if asked."""

    def open_it(name: str, width: int = 1280, scheme: str = "light", *, unfolded: bool = False) -> None:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        chromium.get_log("performance")
        chromium.get_log("browser")
        chromium.get(pages[name].as_uri())
        if unfolded:
            chromium.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")

    return open_it


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_nothing_is_wider_than_the_page_and_all_text_stands_out(
    chromium: Any, axe: str, open_page: Open, name: str, width: int, scheme: str
) -> None:
    for unfolded in (False, True):
        open_page(name, width, scheme, unfolded=unfolded)
        whole, visible, window, wide = chromium.execute_script(_WIDE)
        assert window == width
        assert wide == []
        assert whole == visible
    chromium.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
    assert chromium.execute_async_script(_FAINT) == [1, []]


def test_no_table_of_an_ordinary_card_has_to_be_scrolled(chromium: Any, open_page: Open) -> None:
    open_page("guard_failed", unfolded=True)
    rooms = chromium.execute_script(
        "return [...document.querySelectorAll('.scroll')].map((one) => [one.scrollWidth, one.clientWidth])"
    )
    assert len(rooms) >= 4
    assert [pair for pair in rooms if pair[0] > pair[1]] == []


@pytest.mark.parametrize("name", CARDS)
def test_a_page_asks_for_nothing_and_runs_nothing(chromium: Any, open_page: Open, name: str) -> None:
    open_page(name, unfolded=True)
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [chromium.current_url], "the page itself, and nothing else"
    assert chromium.get_log("browser") == [], "neither errors nor refusals by the page's own policy"
    assert chromium.execute_script("return document.scripts.length") == 0
    assert chromium.title.endswith("run 1 of track default")


def test_each_script_runs_in_its_own_direction(chromium: Any, open_page: Open, made_reports: Any) -> None:
    open_page("hostile", unfolded=True)
    found = chromium.execute_script(
        "return [...document.querySelectorAll('pre')].map((one) => [one.innerText, getComputedStyle(one).direction])"
    )
    directions = dict(found)
    assert [directions[words] for words in made_reports.SCRIPTS] == ["rtl", "ltr", "ltr"]


def test_paper_shows_what_is_folded_on_screen(chromium: Any, open_page: Open) -> None:
    open_page("promoted")
    kept_back = "return getComputedStyle(document.querySelector('details'), '::details-content').contentVisibility"
    assert chromium.execute_script(kept_back) == "hidden"
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = chromium.execute_script(kept_back)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == "visible"
