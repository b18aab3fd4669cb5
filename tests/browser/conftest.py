"""A real Chromium without a window."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: Where a test machine must have them, their absence is an error.
_PROGRAMS = ("chromium", "chromedriver")
_POSSIBLE = all(map(shutil.which, _PROGRAMS)) and importlib.util.find_spec("selenium") is not None
collect_ignore_glob = [] if _POSSIBLE or "CI" in os.environ else ["test_*.py"]


def pytest_report_header() -> str:
    missing = "tests/browser: not run, it needs selenium, and Debian's chromium and chromium-driver"
    return missing if collect_ignore_glob else ""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Give a driver that logs what the page asks for and what goes wrong in it."""
    from selenium import webdriver  # noqa: PLC0415 - collected without it too

    places = [shutil.which(name) for name in _PROGRAMS]
    assert all(places), f"{' and '.join(_PROGRAMS)} must be there: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = str(places[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(places[1])))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def axe() -> str:
    """Give axe-core's script, which finds what is wrong for people who see or move little."""
    found = importlib.util.find_spec("axe_core_python")
    assert found is not None, "axe-core-python must be installed: pip install -e '.[dev]'"
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0], "axe.min.js").read_text()
