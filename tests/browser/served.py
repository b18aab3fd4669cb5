"""The page of a workspace, served by `dropforge web` in a process of its own, and looked at with Chromium."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

#: Longest wait for what the page is to show; the tests' own limit ends what hangs.
_SECONDS = 240
_LISTENS = re.compile(rb"http://127\.0\.0\.1:(\d+)/\?token=(\S+)")


class Served:
    """A workspace's page, and the browser that shows it."""

    def __init__(self, folder: Path, driver: Any) -> None:
        self.folder = folder
        self.driver = driver
        self.port, self.token = 0, ""
        self.process: subprocess.Popen[bytes] | None = None
        # On a busy machine a click is answered before the next page is there.
        driver.implicitly_wait(_SECONDS)

    def start(self) -> None:
        """Serve the page, again on the port that it had."""
        argv = [sys.executable, "-P", "-m", "daemon", "web"]
        at = {**os.environ, "DROPFORGE_WEB__LISTEN": f"127.0.0.1:{self.port}"}
        self.process = subprocess.Popen(
            argv, cwd=self.folder, env=at, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        found = next(filter(None, map(_LISTENS.search, self.process.stdout)))
        self.port, self.token = int(found[1]), found[2].decode()

    def kill(self) -> None:
        """End the server as the kernel does when memory runs out."""
        assert self.process is not None
        self.process.kill()
        self.process.communicate()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def enter(self) -> None:
        """Open the address that was printed, with its token."""
        self.driver.get(f"{self.address}/?token={self.token}")

    def open(self, path: str, width: int = 1280, scheme: str = "light") -> None:
        """Open a page on a screen."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(self.address + path)
        # Gone with a reload.
        self.driver.execute_script("window.kept = true")

    def drop(self, file: Path) -> None:
        """Drag a file over the page and let it go there."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 500, "y": 700, "data": data}
            self.driver.execute_cdp_cmd("Input.dispatchDragEvent", event)

    def was_kept(self) -> bool:
        """Say whether the page is the one that was opened: not reloaded, not left."""
        return bool(self.driver.execute_script("return window.kept === true"))

    def unfold(self) -> None:
        """Open everything that is folded."""
        self.driver.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")

    def find(self, selector: str) -> WebElement:
        """Return the first element that a CSS selector means."""
        found: WebElement = self.driver.find_element(By.CSS_SELECTOR, selector)
        return found

    def link(self, words: str) -> WebElement:
        """Return the link with these words."""
        found: WebElement = self.driver.find_element(By.LINK_TEXT, words)
        return found

    def text(self, selector: str = "main") -> str:
        """Return what can be read of an element, in one line."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return " ".join(str(self.driver.execute_script(script, selector)).split())

    def texts(self, selector: str) -> list[str]:
        """Return what can be read of each element."""
        return [" ".join(one.text.split()) for one in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait for something to be so."""
        WebDriverWait(self.driver, _SECONDS, poll_frequency=0.1).until(lambda _driver: condition())

    def wait_for(self, words: str, selector: str = "main") -> None:
        """Wait for words to be readable in an element."""
        self.wait(lambda: words in self.text(selector))
