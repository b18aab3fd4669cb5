"""Settings by which the daemon would eat its own files or wait for ever, or that nobody can read: refused at once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from daemon.settings.load import load, section_of
from daemon.settings.model import Settings, SettingsError, TrackSettings
from tests.daemon.conftest import dropforge

__all__ = ["dropforge"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give home/work with settings, a state folder and a base model; links and files beside it lead into it."""
    work = tmp_path / "home" / "work"
    for name in ("inbox", ".dropforge/drops", "base/below"):
        (work / name).mkdir(parents=True)
    (work / "to-state").symlink_to(".dropforge")
    (work / "to-work").symlink_to("../work")
    (tmp_path / "to-home").symlink_to("home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return work


OVERLAPS = {
    'inbox = "."': "the folder of the settings file",
    'inbox = ""': "must name a folder",
    'inbox = "a\\u0000b"': "NUL",
    'state = ""': "must name a folder",
    'inbox = "~nobody-of-that-name/inbox"': "~nobody-of-that-name",
    'inbox = ".dropforge"': "the state folder",
    'inbox = ".dropforge/inbox"': "in the state folder",
    'inbox = "to-state"': "the state folder",
    'inbox = "to-work"': "the folder of the settings file",
    'inbox = ".."': "around the folder of the settings file",
    'inbox = "/"': "around the folder of the settings file",
    'inbox = "base"': "the base model",
    'inbox = "new"\nbase_model = "new/model"': "around the base model",
    'inbox = "drop"\n[tracks.support]\nbase_model = "drop"': "the base model",
    'state = "inbox"': "the state folder",
    'state = "new"\ninbox = "new/inbox"': "in the state folder",
}


@pytest.mark.parametrize("text", OVERLAPS)
def test_an_inbox_that_would_eat_its_own_files_is_refused(
    workspace: Path, dropforge: Callable[..., Any], text: str
) -> None:
    path = workspace / "dropforge.toml"
    path.write_text(f"{text}\n" if "base_model" in text else f'base_model = "base"\n{text}\n')
    done = dropforge("--config", path, "status")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {path}: ")
    assert OVERLAPS[text] in done.err
    assert "hint: found " in done.err


def test_home_and_what_is_around_it_are_no_inbox_but_state_may_be_home_as_it_is_for_a_service(
    workspace: Path, tmp_path: Path, dropforge: Callable[..., Any]
) -> None:
    path = tmp_path / "etc" / "dropforge.toml"
    path.parent.mkdir()
    for inbox, words in ((workspace.parent, "is the home folder"), (tmp_path / "home/..", "around")):
        path.write_text(f'inbox = "{inbox}"\nstate = "/var/lib/not-there"\n')
        done = dropforge("--config", path, "status")
        assert (done.code, words in done.err) == (2, True), done.err
    path.write_text(f'state = "{workspace.parent}"\ninbox = "/srv/not-there/inbox"\n')
    assert dropforge("--config", path, "status").code in {0, 69}


@pytest.mark.parametrize("text", ["", 'state = "../.."\ninbox = "/srv/not-there/inbox"', 'inbox = "../inbox"'])
def test_what_the_readme_has_stays_allowed_and_the_environment_is_held_to_the_rules_too(
    workspace: Path, dropforge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (workspace / "dropforge.toml").write_text(text)
    assert dropforge("--config", workspace / "dropforge.toml", "status").code in {0, 69}
    monkeypatch.setenv("DROPFORGE_INBOX", ".")
    done = dropforge("--config", workspace / "dropforge.toml", "status")
    assert (done.code, done.err.startswith("error: DROPFORGE_INBOX: inbox: ")) == (2, True), done.err


def numbers(model: type[BaseModel], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the place of every setting that is a number."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from numbers(section, (*place, name))
        elif field.annotation in {int, float}:
            yield (*place, name)


NUMBERS = list(numbers(Settings))
#: What each number is tried with, and whether some may be as small as that.
ABSURD = {
    **dict.fromkeys(("1e300", "1" + "0" * 40, "-1", "inf", "nan", "'-inf'", "0x" + "f" * 5000), False),
    "5e-324": True,
}


@pytest.mark.parametrize("text", ABSURD, ids=lambda text: text[:9])
def test_no_number_may_be_absurd(tmp_path: Path, text: str) -> None:
    refused = 0
    for *sections, name in NUMBERS:
        dotted, path = ".".join((*sections, name)), tmp_path / "dropforge.toml"
        track = not sections or sections[0] in TrackSettings.model_fields
        tables = [f"[{'.'.join(sections)}]\n" if sections else ""]
        tables += [f"[{'.'.join(('tracks', 'a', *sections))}]\n"] if track and name in _track_fields(sections) else []
        for table in tables:
            path.write_text(f"{table}{name} = {text}\n")
            refused += _is_refused(path, {}, dotted, small=ABSURD[text])
        path.write_text("")
        variable = "DROPFORGE_" + "__".join((*sections, name)).upper()
        if not text.startswith("0x"):
            refused += _is_refused(path, {variable: text}, dotted, small=ABSURD[text])
    assert refused


def _track_fields(sections: list[str]) -> set[str]:
    model: type[BaseModel] = TrackSettings
    for name in sections:
        model = section_of(model.model_fields[name]) or model
    return set(model.model_fields)


def _is_refused(path: Path, environment: dict[str, str], dotted: str, *, small: bool) -> bool:
    error = None
    try:
        load(path, environment)
    except SettingsError as found:
        error = found
    assert error is not None or small, f"{dotted}: {path.read_text()[:40]} {environment}"
    assert error is None or (dotted in error.message and error.hint), dotted
    return error is not None


DEEP = 50_000
UNREADABLE = {
    "arrays 50,000 deep": f"hooks.health = {'[' * DEEP}{']' * DEEP}",
    "inline tables 50,000 deep": f"train = {'{a = ' * DEEP}1{'}' * DEEP}",
    "number of 5,000 digits": f"reconcile_seconds = {'9' * 5000}",
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_settings_that_nobody_can_read_are_an_error_and_no_traceback(
    tmp_path: Path, dropforge: Callable[..., Any], case: str
) -> None:
    path = tmp_path / "dropforge.toml"
    path.write_text(UNREADABLE[case], encoding="utf-8", errors="surrogateescape")
    done = dropforge("status")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: dropforge.toml")
    assert len(done.err) < 1000


@pytest.mark.parametrize("name", ["DROPFORGE_HOOKS__HEALTH", "DROPFORGE_INBOX"])
def test_a_variable_nested_too_deeply_is_an_error(
    tmp_path: Path, dropforge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "dropforge.toml").touch()
    for text in ("[" * DEEP + "]" * DEEP, '{"a":' * 20_000 + "1" + "}" * 20_000):
        monkeypatch.setenv(name, text)
        done = dropforge("status")
        assert (done.code, done.err.startswith(f"error: {name}")) == (2, True), done.err[:300]
        assert len(done.err) < 1000
