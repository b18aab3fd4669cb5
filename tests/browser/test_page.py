"""The web page in a real browser, served by a process of its own: what each person sees and does on it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from sqlmodel import col, select

from daemon.champions.base_models import Base
from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled
from daemon.queue.order import pause
from daemon.queue.states import Claim
from daemon.state.database import transaction
from daemon.state.events import Word
from daemon.state.tables import Promotion
from daemon.views.overview import Overview
from pipeline.models.manifest import model_id
from tests.browser.furnished import begin, furnish, judge, progress, rows, running
from tests.browser.served import Served
from tests.daemon.conftest import LivedIn, make_workspace

PAGES = [
    "/",
    "/runs",
    "/runs/4",
    "/runs/5",
    "/runs/7",
    "/drops",
    "/drops/6",
    "/drops/7",
    "/tracks/default",
    "/inbox",
    "/runs/6/review",
    "/nowhere",
]
SCREENS = [(1280, "light"), (400, "dark")]
_AXE = """
const done = arguments[0];
axe.run(document, {iframes: false, resultTypes: ["violations"]}).then(
  (found) => done(found.violations.map((one) => [one.id, one.impact, one.nodes.map((node) => node.html)])));
"""
#: Every place that the keyboard is to reach, and whether it shows that it was reached.
_STOPS = """
return [...document.querySelectorAll("a[href], button, input:not([type=hidden]), select, summary, iframe")]
  .filter((one) => one.checkVisibility() && !one.disabled).length;
"""
_REACHED = """
const at = document.activeElement;
if (at === document.body) return null;
at.dataset.reached = true;
const style = getComputedStyle(at), box = at.getBoundingClientRect();
const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
return [seen && box.bottom > 0 && box.top < innerHeight, at.outerHTML.slice(0, 100)];
"""
#: How often the page has asked for itself.
_ASKED_AGAIN = "return performance.getEntriesByName(location.href, 'resource').length"


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, made_reports: Any, chromium: Any) -> Iterator[Served]:
    """Give the page of a workspace with something of everything, which no test changes."""
    folder = tmp_path_factory.mktemp("furnished")
    made = make_workspace(folder)
    furnish(made, made_reports)
    served = Served(folder, chromium)
    with running(made.settings.state_folder):
        served.start()
        served.enter()
        yield served
        served.kill()


@pytest.fixture
def room(tmp_path: Path, made_reports: Any, request: pytest.FixtureRequest) -> tuple[LivedIn, Claim, Path]:
    """
    Give such a workspace to change: it, its running run, and the folder of that run's attempt.

    Its base model is the one that a test's parameter names, or one that cannot be loaded.
    """
    base = request.getfixturevalue(request.param) if hasattr(request, "param") else None
    made = make_workspace(tmp_path, base and Base(base, model_id(base)))
    return (made, *furnish(made, made_reports))


@pytest.fixture
def served(room: tuple[LivedIn, Claim, Path], chromium: Any) -> Iterator[Served]:
    """Give the page of that workspace."""
    made, _, _ = room
    page = Served(made.folder, chromium)
    with running(made.settings.state_folder):
        page.start()
        page.enter()
        yield page
        page.kill()


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_page_is_for_everybody(furnished: Served, axe: str, path: str, width: int, scheme: str) -> None:
    furnished.open(path, width, scheme)
    furnished.unfold()
    furnished.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
    assert furnished.driver.execute_async_script(_AXE) == []
    whole, visible = furnished.driver.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert whole == visible, "nothing is wider than the page"


@pytest.mark.parametrize("path", PAGES[:-1])
def test_a_page_loads_nothing_from_elsewhere(furnished: Served, path: str) -> None:
    furnished.driver.get_log("performance")
    furnished.driver.get_log("browser")
    furnished.open(path)
    furnished.unfold()
    events = [json.loads(entry["message"])["message"] for entry in furnished.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(asked) >= 3, "the page, its style and its script"
    assert [url for url in asked if not url.startswith((furnished.address, "data:"))] == []
    assert furnished.driver.get_log("browser") == [], "neither errors nor refusals by the page's own policy"


def test_the_keyboard_reaches_everything_and_shows_where_it_is(furnished: Served) -> None:
    for path in ("/", "/tracks/default", "/inbox", "/runs/4"):
        furnished.open(path)
        stops = furnished.driver.execute_script(_STOPS)
        keyboard = ActionChains(furnished.driver, duration=0)
        unseen = []
        for _ in range(stops + 5):
            keyboard.send_keys(Keys.TAB).perform()
            reached = furnished.driver.execute_script(_REACHED)
            if reached is None:
                break
            unseen += [] if reached[0] else [reached[1]]
        assert reached is None, "the way ends where it began: nothing holds the keyboard"
        assert unseen == []
        assert furnished.driver.execute_script("return document.querySelectorAll('[data-reached]').length") == stops


def test_a_dropped_file_becomes_a_run_a_curve_and_a_verdict_without_a_reload(
    served: Served, room: tuple[LivedIn, Claim, Path], made_reports: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made, claim, _ = room
    file = tmp_path_factory.mktemp("elsewhere") / "brought.jsonl"
    file.write_text(rows("what was brought", 70))
    served.open("/inbox")
    served.drop(file)
    served.wait_for("is in the inbox", '[role="status"]')
    assert (made.settings.inbox_folder / "brought.jsonl").read_bytes() == file.read_bytes()
    # What the daemon does with it, while the browser looks on.
    served.link("Continue").click()
    served.wait(lambda: served.driver.execute_script(_ASKED_AGAIN))
    assert "brought.jsonl" not in served.text("#drops")
    Intake(made.engine, made.settings).take(Settled("default", "train", b"brought.jsonl"), made.tick())
    served.wait_for("brought.jsonl Accepted", "#drops")
    served.open("/")
    shutil.rmtree(made.settings.state_folder / f"runs/{claim.run_id}")
    made.fail(claim)
    served.wait_for(f"Run {claim.run_id} failed", "#attention")
    begun = begin(made)
    folder = made.attempt(begun, "train", None)
    served.wait_for(f"Run {begun.run_id} of track default trains", "h1")
    lines = []
    for step in (10, 20, 30, 40):
        progress(folder, step, 2 - step / 40, 2.1 - step / 40)
        served.wait_for(f"{step} / 240", "#running")
        lines.append(served.find("#running polyline.trained").get_attribute("points") or "")
    assert len(set(lines)) == 4, "the curve moves"
    assert len(set(lines[-1].split())) == 4, "a point for each step"
    shutil.rmtree(folder)
    judge(made, made_reports, begun, "promoted", 2)
    served.wait_for(f"run {begun.run_id} Promoted +6.5 points", "#latest")
    served.wait_for("generation 3", "#champions")
    assert served.was_kept()
    served.find(f'#latest a[href="/runs/{begun.run_id}"]').click()
    served.link("Open it as a page of its own").click()
    served.wait(lambda: served.driver.title == f"Won: run {begun.run_id} of track default")


def test_a_dropped_table_shows_its_columns_and_is_sent_again_without_being_chosen_again(
    served: Served, room: tuple[LivedIn, Claim, Path], tmp_path_factory: pytest.TempPathFactory, axe: str
) -> None:
    made, _, _ = room
    file = tmp_path_factory.mktemp("elsewhere") / "table.csv"
    file.write_text("text,label,stars\na,x,1\nb,y,2\n")
    served.open("/inbox")
    served.drop(file)
    served.wait_for("table.csv: which column is what?", "h1")
    assert "the columns are guessed from their names" in served.text()
    assert served.was_kept()
    served.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
    assert served.driver.execute_async_script(_AXE) == []
    served.driver.execute_script("document.querySelector('select[name=output]').value = 'stars'")
    served.find("form.target button:not(.main)").click()
    served.wait_for("Record 1 instruction a output 1 Record 2 instruction b output 2")
    assert "guessed" not in served.text()
    served.find("form.target button.main").click()
    served.wait_for("table.jsonl is in the inbox: 2 rows = 2 records + 0 rows lost", '[role="status"]')
    assert (made.settings.inbox_folder / "table.jsonl").read_text() == (
        '{"instruction": "a", "output": "1"}\n{"instruction": "b", "output": "2"}\n'
    )
    served.link("Continue").click()
    served.wait_for("Drop a file, and see what becomes of it", "h1")


@pytest.mark.parametrize("room", ["tiny_llama"], indirect=True)
def test_a_rollback_asks_for_its_reason_and_happens(served: Served, room: tuple[LivedIn, Claim, Path]) -> None:
    made, _, _ = room
    served.open("/tracks/default")
    served.driver.execute_script("document.querySelector('.timeline > li:last-child summary').focus()")
    keyboard = ActionChains(served.driver)
    keyboard.send_keys(Keys.ENTER, Keys.TAB, Keys.ENTER).perform()
    assert served.was_kept(), "without a reason nothing is sent"
    assert Overview.of(made.settings).champion("default").generation == 2  # type: ignore[union-attr]
    # What else happens takes nothing away from who writes.
    keyboard.send_keys("it swears").perform()
    pause(made.engine, "default", Word("the box is lent", made.tick(), "ada"))
    served.wait(lambda: served.driver.title.startswith("Track default, paused"))
    keyboard.send_keys(" at customers", Keys.ENTER).perform()
    served.wait_for("serves", '[role="status"]')
    with transaction(made.engine) as session:
        last = session.exec(select(Promotion).order_by(col(Promotion.id).desc())).first()
        assert last is not None
        assert (last.kind, last.generation, last.restored) == ("rollback", 3, 0)
        assert last.reason == "it swears at customers"
    served.link("Continue").click()
    served.wait_for("paused by ada")
    assert "Generation 3 Serves" in served.text()
    assert "it swears at customers" in served.text()


def test_answers_are_judged_blind_by_single_keys_and_by_buttons_without_script(served: Served) -> None:
    served.open("/runs/6")
    served.link("Judge the answers blind").click()
    for place, key in enumerate(["1", "2", *"0" * 17], 1):
        served.wait_for(f"Pair {place} of 20")
        ActionChains(served.driver).send_keys("x", key).perform()
    served.wait_for("Pair 20 of 20")
    ActionChains(served.driver).send_keys("u").perform()
    served.wait_for("Pair 19 of 20")
    ActionChains(served.driver).send_keys("0").perform()
    served.wait_for("Pair 20 of 20")
    served.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        served.driver.get(f"{served.address}/runs/6/review")
        served.find('button[value="0"]').click()
        served.wait(lambda: served.texts('[role="status"]'))
        assert "judged blind by " in served.find('[role="status"]').text
    finally:
        served.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "neither in 18" in served.text()


def test_the_page_comes_back_with_its_server_and_has_missed_nothing(
    served: Served, room: tuple[LivedIn, Claim, Path]
) -> None:
    made, _, folder = room
    served.open("/")
    served.kill()
    served.wait_for("no connection", "#health")
    progress(folder, 120, 0.55, 0.66)
    made.take("meanwhile.jsonl", rows("meanwhile"))
    served.start()
    served.wait_for("120 / 240", "#running")
    served.wait_for("meanwhile.jsonl", "#drops")
    assert "no connection" not in served.text("#health")
    assert served.was_kept()
    before = served.text()
    served.driver.refresh()
    assert served.text() == before


def test_without_script_everything_is_there_and_forms_are_sent(served: Served) -> None:
    served.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        served.driver.get(f"{served.address}/drops/9")
        served.find("details.act > summary").click()
        served.find("input[name=reason]").send_keys("it is wrong")
        served.find("details.act button").click()
        served.find('[role="status"]')
        served.driver.get(f"{served.address}/drops/9")
        assert "Withdrawn" in served.find("h1").text
        served.driver.get(served.address)
        assert served.find("#running polyline.trained").get_attribute("points")
        assert "reload it to see what is new" in served.find("footer").text
    finally:
        served.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
