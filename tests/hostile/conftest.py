import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest

from tests.hostile.people import Box, Namespace, NewBox, scratch

#: Where a test machine must have them, their absence is an error.
_POSSIBLE = os.geteuid() == 0 and all(map(shutil.which, ("unshare", "nsenter", "setpriv")))
collect_ignore_glob = [] if _POSSIBLE or "CI" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def namespace() -> Iterator[Namespace]:
    """The namespace in which the people of these tests are known."""
    with scratch() as folder:
        made = Namespace(folder)
        yield made
        made.close()


@pytest.fixture
def new_box(namespace: Namespace) -> Iterator[NewBox]:
    """A factory of installations, whose daemons are ended after the test."""
    with _boxes(namespace) as make:
        yield make


@pytest.fixture(scope="module")
def box(namespace: Namespace) -> Iterator[Box]:
    """An installation as README.md has it; its daemon runs. It is shared by the tests of a file."""
    with _boxes(namespace) as make:
        made = make()
        made.start()
        yield made


@contextlib.contextmanager
def _boxes(namespace: Namespace) -> Iterator[NewBox]:
    boxes: list[Box] = []
    with scratch() as folder:

        def make(settings: str = "", inbox_mode: int = 0o3770) -> Box:
            place = folder / str(len(boxes))
            place.mkdir()
            boxes.append(Box(namespace, place, settings, inbox_mode))
            return boxes[-1]

        yield make
        for box in boxes:
            box.stop()
