"""`dropforge messages`, `--test` and what `doctor` says of the addresses; none of them shows a secret."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.messages import outbox
from daemon.messages.addresses import examine
from daemon.settings.load import load
from daemon.settings.sections import MessageSettings, shown_url
from tests.daemon.messages.conftest import Address, fail_hook

Command = Callable[..., Any]


def with_urls(folder: Path, *urls: str) -> None:
    path = folder / "dropforge.toml"
    listed = ", ".join(f'"{url}"' for url in urls)
    before = path.read_text().partition("[messages]")[0] if path.exists() else ""
    path.write_text(f'{before}[messages]\nurls = [{listed}]\ndigest = ""\n')


def test_a_test_message_is_sent_now_and_what_came_back_is_said(
    dropforge: Command, tmp_path: Path, address: Address
) -> None:
    with_urls(tmp_path, address.url, "json://u:hunter2@127.0.0.1:1/")
    done = dropforge("messages", "--test")
    assert (done.code, done.out.splitlines()) == (
        1,
        [
            "json://127.0.0.1: taken",
            "json://127.0.0.1: not taken: it was not reached, or refused the login or the message",
        ],
    )
    assert address.titles == ["[dropforge] test"]
    with_urls(tmp_path, address.url)
    done = dropforge("messages", "--test", "--json")
    assert (done.code, done.json["tried"]) == (0, [{"address": "json://127.0.0.1", "error": None}])


def test_without_an_address_the_file_in_use_is_named_and_the_one_that_only_the_unit_reads(
    dropforge: Command, lived_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = lived_in.folder / "etc" / "dropforge.toml"
    service.parent.mkdir()
    state, inbox = lived_in.settings.state_folder.absolute(), lived_in.settings.inbox_folder.absolute()
    service.write_text(f'state = "{state}"\ninbox = "{inbox}"\n')
    away = lived_in.folder / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    assert f"hint: set urls in [messages] of {service}\n" in dropforge("messages", "--test").err
    (service.parent / "environment").write_text("DROPFORGE_MESSAGES__URLS=[]\n")
    unit = f"{service}; those in {service.parent}/environment only the unit has: see docs/operations.md, Monitoring\n"
    assert dropforge("messages", "--test").err.endswith(f"hint: set urls in [messages] of {unit}")
    assert dropforge("messages").out == f"no address is set: urls in [messages] of {unit}"


def test_what_has_not_arrived_is_listed_with_why(lived_in: Any, dropforge: Command) -> None:
    with_urls(lived_in.folder, "json://u:hunter2@127.0.0.1:1/")
    assert dropforge("messages").out == "no message waits\n"
    settings = load(lived_in.folder / "dropforge.toml", {})
    outbox.open_outbox(lived_in.engine, settings, lived_in.now)
    fail_hook(lived_in, "one", "two")
    outbox.collect(lived_in.engine, settings, lived_in.now)
    address = settings.messages.urls[0].address
    taken = outbox.take(lived_in.engine, address, lived_in.now)
    assert taken is not None
    outbox.record_failure(lived_in.engine, taken.id or 0, "the answer was 500")
    done = dropforge("messages")
    assert done.out.count("[dropforge] HOOK FAILED: default") == 2
    assert done.out.splitlines()[-1] == "json://127.0.0.1: the answer was 500"
    found = dropforge("messages", "--json").json
    assert found["addresses"] == ["json://127.0.0.1"]
    assert [(one["id"], one["state"], one["tries"], one["error"]) for one in found["messages"]] == [
        (1, "pending", 1, "the answer was 500"),
        (2, "pending", 0, None),
    ]
    assert "hunter2" not in done.out + str(found)
    with_urls(lived_in.folder)
    assert address in dropforge("messages").out


def test_doctor_says_which_address_cannot_be_read(lived_in: Any, dropforge: Command) -> None:
    with_urls(lived_in.folder, "json://u:hunter2@127.0.0.1:1/", "nonsense://hunter2")
    file = lived_in.folder / "dropforge.toml"
    file.chmod(0o644)

    def found() -> list[tuple[str, str]]:
        every = dropforge("doctor", "--json").json["findings"]
        return [(one["level"], one["text"]) for one in every if one["name"] == "messages"]

    wrong = ("bad", "Apprise cannot read number 2 of messages.urls, nonsense://…")
    assert found() == [("warn", "others may read dropforge.toml, and addresses hold passwords"), wrong]
    file.chmod(0o600)
    assert found() == [wrong]
    file.chmod(0o644)
    file.write_text(file.read_text().partition("[messages]")[0] + '[messages]\ndigest = "09:00"\n')
    assert found() == [], "the sample has such a header, and no password"
    settings = MessageSettings.model_validate({"urls": ["json://u:p@here/", "json://there/x"]})
    (well,) = examine(settings, file)
    assert (well.level, well.text) == ("ok", "go to json://here, json://there")
    assert list(examine(MessageSettings(), file)) == []


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("mailto://user:hunter2@example.org?to=a@example.net", "mailto://example.org"),
        ("json://user:hunter2@[::1]:8080/path/token", "json://::1"),
        ("https://hc-ping.com/uuid", "https://hc-ping.com"),
        ("mailto://user:hun/ter2@example.org", "mailto://…"),
        ("mailto://user:hun?ter2@example.org", "mailto://…"),
        ("slack://TokenA/TokenB/TokenC", "slack://…"),
        ("ntfy://topic", "ntfy://…"),
        ("json://[broken", "json://…"),
        ("hunter2", ""),
    ],
)
def test_of_an_address_scheme_and_host_are_seen_alone(url: str, seen: str) -> None:
    assert shown_url(url) == seen


def test_a_wrong_address_is_refused_without_being_repeated(dropforge: Command, tmp_path: Path) -> None:
    with_urls(tmp_path, "hunter2")
    done = dropforge("messages")
    assert done.code == 2
    assert "messages.urls: must be URLs as Apprise writes them" in done.err
    assert "hunter2" not in done.err
