"""While the shared folder is not mounted, a command or an action of the page that writes is refused."""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.settings.load import load
from daemon.state.ownership import installation_id
from daemon.storage.backup import make
from daemon.web import actions
from daemon.web.security import cookie_name
from daemon.web.server import make_app
from tests.daemon.web.conftest import HERE, TOKEN

COMMANDS = (
    ("promote", "1"),
    ("promote", "1", "--force", "--reason", "x"),
    ("rollback", "--reason", "x"),
    ("hook",),
    ("gc",),
    ("gc", "--dry-run"),
    ("backup", "kept"),
    ("backup", "--models"),
    ("restore", "before"),
    ("train",),
    ("retry", "2"),
    ("cancel", "3"),
    ("drops", "withdraw", "6", "--reason", "x"),
    ("drops", "restore", "6", "--reason", "x"),
)
FIELDS = {"reason": "x", "force": "true", "pair": "x", "key": "1"}


@pytest.fixture
def unmounted(lived_in: Any) -> Any:
    """`lived_in` with a shared folder, in whose place is an empty mount point."""
    folder = lived_in.folder
    make(lived_in.settings, folder / "before")
    share = folder / "share"
    share.mkdir()
    for name in ("drops", "runs", "models", "tracks"):
        (lived_in.settings.state_folder / name).rename(share / name)
    with (folder / "dropforge.toml").open("a") as file:
        file.write(f'[executor]\nshared = "{share}"\n')
    lived_in.settings = load(folder / "dropforge.toml", {})
    installation_id(lived_in.settings)
    shutil.move(share, folder / "aside")
    share.mkdir()
    return lived_in


def content(unmounted: Any) -> dict[str, bytes]:
    """Return what a user would lose or find: the rows, the files and the links; without locks and notes."""
    with contextlib.closing(sqlite3.connect(unmounted.settings.state_folder / "dropforge.db")) as database:
        rows = "\n".join(database.iterdump()).encode()
    skipped = (".db", ".db-wal", ".db-shm", ".lock", "/share-gone")
    paths = [path for path in sorted(unmounted.folder.rglob("*")) if not str(path).endswith(skipped)]
    return {"rows": rows, **{str(path): path.read_bytes() if path.is_file() else b"" for path in paths}}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_refused_and_changes_nothing(
    unmounted: Any, dropforge: Callable[..., Any], command: tuple[str, ...]
) -> None:
    before = content(unmounted)
    done = dropforge(*command)
    assert (done.code, "the shared folder is not mounted" in done.err, done.out) == (1, True, ""), done.err
    assert "hint: mount it" in done.err
    assert content(unmounted) == before


@pytest.mark.parametrize("path", sorted(actions._ACTIONS), ids="/".join)
def test_an_action_of_the_page_is_refused_and_changes_nothing(unmounted: Any, path: tuple[str, str]) -> None:
    before = content(unmounted)
    app = make_app(unmounted.settings, TOKEN)
    page = TestClient(app, base_url=HERE, cookies={cookie_name(TOKEN): TOKEN}, headers={"origin": HERE})
    target = {"runs": "3", "tracks": "default", "drops": "6", "attention": "x"}[path[0]]
    _, told = actions._ACTIONS[path]
    fields = {name: FIELDS[name] for name in (told.model_fields if told else ()) if name in FIELDS}
    answer = page.post(f"/{path[0]}/{target}/{path[1]}", data=fields)
    assert (answer.status_code, "the shared folder is not mounted" in answer.text) == (409, True), answer.text
    assert content(unmounted) == before


@pytest.mark.parametrize("command", [("status",), ("runs",), ("show", "1"), ("history",), ("drops",)], ids=" ".join)
def test_a_question_is_answered(unmounted: Any, dropforge: Callable[..., Any], command: tuple[str, ...]) -> None:
    before = content(unmounted)
    assert dropforge(*command).code in {0, 69}
    assert content(unmounted) == before
