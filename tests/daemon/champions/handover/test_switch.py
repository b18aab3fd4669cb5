"""A server takes the champion: by a restart, by adapter under load, and not at all if it answers otherwise."""

import http.client
import json
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from daemon.champions.handover.server import Change, Server, check, restart, switch_adapter
from daemon.champions.handover.smoke_prompts import SmokePrompt, SmokePrompts
from pipeline.errors import DropforgeError
from tests.stand_in_server import StandIn, write_answers

PROMPTS = [f"say word {number}" for number in range(8)]
RESTART = "import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1] + '/restart', b'{}', method='POST'))"


def answers(model: int) -> dict[str, str]:
    return dict.fromkeys(PROMPTS, f"word of model {model}")


def change(folder: Path, model: int, *, right: int | None = None, base: bool = False, adapter: bool = True) -> Change:
    """Return the change to a model, whose smoke prompts expect the words of `right`."""
    written = write_answers(folder / f"adapter-{model}", answers(model))
    expected = model if right is None else right
    prompts = tuple(
        SmokePrompt(content=prompt, answer=f"word of model {expected}", other="other") for prompt in PROMPTS
    )
    name = f"{model:064x}"[::-1]
    asked = SmokePrompts(model_id=name, prompts=prompts, max_tokens=16, repetition_penalty=1.0)
    return Change("default", name, base, str(written) if adapter and not base else "", asked)


@pytest.fixture
def stand(tmp_path: Path) -> Any:
    with StandIn(write_answers(tmp_path / "served", answers(0))) as served:
        yield served


def test_a_server_that_is_restarted_is_waited_for_and_asked(stand: StandIn, tmp_path: Path) -> None:
    write_answers(stand.folder, answers(1))
    words = restart(Server(stand.url), change(tmp_path, 1), [sys.executable, "-c", RESTART, stand.url], seconds=60)
    assert words == "base answered 8 of 8 smoke prompts as the champion did"


@pytest.mark.parametrize(("wrong", "passes"), [(3, True), (4, False)])
def test_most_answers_have_to_be_the_champions(stand: StandIn, tmp_path: Path, wrong: int, *, passes: bool) -> None:
    said = {prompt: "another" if place < wrong else text for place, (prompt, text) in enumerate(answers(1).items())}
    write_answers(stand.folder, said)
    stand.restart()
    if passes:
        assert f"answered {8 - wrong} of 8" in check(Server(stand.url), change(tmp_path, 1), 60)
    else:
        with pytest.raises(DropforgeError, match=f"answered {8 - wrong} of 8"):
            check(Server(stand.url), change(tmp_path, 1), 60)


def test_a_command_that_cannot_restart_the_server_fails(stand: StandIn, tmp_path: Path) -> None:
    with pytest.raises(DropforgeError, match="ended with exit code 5"):
        restart(Server(stand.url), change(tmp_path, 1), [sys.executable, "-c", "raise SystemExit(5)"], 60)
    with pytest.raises(DropforgeError, match="no-such-program could not restart the server"):
        restart(Server(stand.url), change(tmp_path, 1), ["no-such-program"], 60)


def test_a_server_that_is_not_there_is_waited_for_no_longer_than_it_was_said(tmp_path: Path) -> None:
    for seconds in (0.1, 0):
        with pytest.raises(DropforgeError, match=f"was not up within {seconds} s"):
            check(Server(f"unix:{tmp_path}/none.sock"), change(tmp_path, 1), seconds)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("<html>", "answered /v1/models with no JSON: "),
        ("[" * 100_000, "answered /v1/models with no JSON: "),
        ('{"data": [{"id": 1}]}', "names no model"),
        ("x" * (16 << 20) + "x", "its answer has more than 16,777,216 bytes"),
    ],
    ids=["page", "deep", "number", "endless"],
)
def test_what_is_no_list_of_models_is_a_sentence(
    stand: StandIn, monkeypatch: pytest.MonkeyPatch, said: str, words: str
) -> None:
    monkeypatch.setattr(stand, "get", lambda _path: (200, said))
    with pytest.raises(DropforgeError, match=words):
        Server(stand.url).models()


@pytest.mark.parametrize("said", ["no", '{"choices": [{"message": "x"}]}'])
def test_what_is_no_answer_is_a_sentence(
    stand: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(stand, "chat", lambda _asked: (200, said))
    with pytest.raises(DropforgeError, match=r"gave no answer|with no JSON"):
        check(Server(stand.url), change(tmp_path, 1), 60)


def test_an_adapter_gets_a_name_of_its_own_that_clients_are_told_once_it_answers(
    stand: StandIn, tmp_path: Path
) -> None:
    name_file, server = tmp_path / "name", Server(stand.url)
    first, second, third = (change(tmp_path, model) for model in (1, 2, 3))
    switch_adapter(server, first, name_file, 60)
    assert name_file.read_text() == f"{first.name}\n"
    switch_adapter(server, second, name_file, 60)
    assert list(stand.models) == ["base", first.name, second.name], "who read the former name is still answered"
    switch_adapter(server, third, name_file, 60)
    assert list(stand.models) == ["base", second.name, third.name]
    # Back to the former champion: nothing is loaded, and no name twice.
    switch_adapter(server, second, name_file, 60)
    assert name_file.read_text() == f"{second.name}\n"
    assert stand.names_loaded == [first.name, second.name, third.name]


@pytest.mark.parametrize(
    ("second", "words", "hint"),
    [
        ({"right": 9}, "answered 0 of 8 smoke prompts", ""),
        ({"adapter": False}, "has no adapter over the base: its method makes none", "serve-hook --restart"),
    ],
    ids=["answers otherwise", "no adapter"],
)
def test_a_champion_that_cannot_be_switched_to_is_named_to_nobody_and_the_former_one_stays(
    stand: StandIn, tmp_path: Path, second: dict[str, Any], words: str, hint: str
) -> None:
    name_file, server = tmp_path / "name", Server(stand.url)
    first = change(tmp_path, 1)
    switch_adapter(server, first, name_file, 60)
    with pytest.raises(DropforgeError, match=words) as refused:
        switch_adapter(server, change(tmp_path, 2, **second), name_file, 60)
    assert hint in refused.value.hint
    assert name_file.read_text() == f"{first.name}\n"
    assert list(stand.models) == ["base", first.name]


def test_the_base_is_served_under_its_own_name(stand: StandIn, tmp_path: Path) -> None:
    name_file, server = tmp_path / "name", Server(stand.url)
    switch_adapter(server, change(tmp_path, 1), name_file, 60)
    switch_adapter(server, change(tmp_path, 0, base=True), name_file, 60)
    assert name_file.read_text() == "base\n"


def test_under_load_no_request_fails_and_each_answer_is_one_champions(stand: StandIn, tmp_path: Path) -> None:
    name_file, server = tmp_path / "name", Server(stand.url)
    changes = [change(tmp_path, model) for model in range(1, 6)]
    expected = {one.name: f"word of model {number}" for number, one in enumerate(changes, start=1)}
    switch_adapter(server, changes[0], name_file, 60)
    done, seen, wrong = threading.Event(), [], []
    turn, turns = threading.Condition(), [0] * 4

    def client(number: int) -> None:
        while not done.is_set():
            name = name_file.read_text().strip()
            status, said, model = ask(stand.url, name, PROMPTS[0])
            seen.append(name)
            if (status, said, model) != (200, expected[name], name):
                wrong.append((status, said, model, name))
            with turn:
                turns[number] += 1
                turn.notify_all()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    # Up the line, back by a rollback, and up again: 24 changes, none while a client has still the name before last.
    for place in (1, 2, 1, 3, 4, 3) * 4:
        with turn:
            before = list(turns)
            assert turn.wait_for(lambda: all(now > was for now, was in zip(turns, before, strict=True)), 60)  # noqa: B023
        switch_adapter(server, changes[place], name_file, 60)
    done.set()
    for thread in clients:
        thread.join()
    assert wrong == []
    assert stand.refused == []
    assert len(seen) >= 4


def test_what_the_daemon_tells_is_read_and_nobody_else_is_believed(tmp_path: Path) -> None:
    told = {"PROMOTION_TRACK": "default", "PROMOTION_MODEL_ID": "f" * 64, "PROMOTION_RUN": ""}
    assert Change.from_environment(told) == Change("default", "f" * 64, is_base=True, adapter="", asked=None)
    path = tmp_path / "smoke-prompts.json"
    asked = change(tmp_path, 1).asked
    assert asked is not None
    path.write_text(asked.model_dump_json())
    with pytest.raises(DropforgeError, match="another model has become the champion"):
        Change.from_environment({**told, "PROMOTION_SMOKE_PROMPTS": str(path)})
    path.write_text("{")
    with pytest.raises(DropforgeError, match="cannot be read"):
        Change.from_environment({**told, "PROMOTION_SMOKE_PROMPTS": str(path)})


def ask(url: str, model: str, content: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port, timeout=60)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": content}]})
    try:
        connection.request("POST", "/v1/chat/completions", body)
        reply = connection.getresponse()
        value = json.loads(reply.read())
    finally:
        connection.close()
    return reply.status, value["choices"][0]["message"]["content"] if "choices" in value else "", value.get("model", "")
