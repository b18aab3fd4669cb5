"""Files brought by a browser: into the inbox whole or not at all, and from there through the intake."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from daemon.inbox.intake import Intake
from daemon.inbox.watcher import Settled
from daemon.views.overview import Overview
from daemon.web.server import make_app
from tests.daemon.web.conftest import HERE, TOKEN

GOOD = b'{"instruction": "say z", "output": "z"}\n'


def inbox(lived_in: Any) -> list[str]:
    root = lived_in.settings.inbox_folder
    made = [path for path in root.rglob("*") if path.is_file() and not {"done", "rejected"} & set(path.parts)]
    return sorted(str(path.relative_to(root)) for path in made)


def test_a_file_goes_through_the_same_intake_as_any_other(person: TestClient, lived_in: Any) -> None:
    large = GOOD * 60_000
    answer = person.post("/upload", files={"file": ("new.jsonl", large)}, data={"track": "default"})
    assert answer.status_code == 200
    assert "new.jsonl (2.4 MB) is in the inbox" in answer.text
    path = lived_in.settings.inbox_folder / "new.jsonl"
    assert (path.read_bytes() == large, path.stat().st_mode & 0o777) == (True, 0o640)
    Intake(lived_in.engine, lived_in.settings).take(Settled("default", "train", b"new.jsonl"), lived_in.tick())
    newest = Overview.of(lived_in.settings).drops(most=1)[0]
    assert (newest.name, newest.state, newest.rows) == ("new.jsonl", "accepted", 60_000)


def test_track_and_role_are_read_from_the_form(program: TestClient, lived_in: Any) -> None:
    fields = [("track", (None, "support")), ("heldout", (None, "1"))]
    files = [("file", ("exam.jsonl", GOOD)), ("file", ("more.jsonl", GOOD))]
    answer = program.post("/api/v1/upload", files=[*files, *fields])
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["words"]) == 2
    assert inbox(lived_in) == ["support/heldout/exam.jsonl", "support/heldout/more.jsonl"]


def test_of_files_of_which_one_is_refused_each_is_told(person: TestClient, program: TestClient, lived_in: Any) -> None:
    (lived_in.settings.inbox_folder / "taken.jsonl").write_bytes(b"mine")
    files = [("file", (f"{name}.jsonl", GOOD)) for name in ("first", "taken", "third")]
    answer = program.post("/api/v1/upload", files=files)
    assert answer.status_code == 409
    first, taken, third = answer.json()["error"]["message"].split("; ")
    assert first.startswith("first.jsonl (40 bytes) is in the inbox: ")
    assert taken.startswith("taken.jsonl is refused: ")
    assert "is there already" in taken
    assert third.startswith("third.jsonl (40 bytes) is in the inbox: ")
    assert "under another name" in answer.json()["error"]["hint"]
    assert inbox(lived_in) == ["first.jsonl", "taken.jsonl", "third.jsonl"]
    assert (lived_in.settings.inbox_folder / "taken.jsonl").read_bytes() == b"mine"
    again = person.post("/upload", files=[("file", ("fourth.jsonl", GOOD)), files[1]])
    assert again.status_code == 409
    assert "fourth.jsonl (40 bytes) is in the inbox" in again.text
    assert "taken.jsonl is refused" in again.text


@pytest.mark.parametrize(
    "name", ["../up.jsonl", "/etc/x.jsonl", "..", ".hidden.jsonl", "x.part", "n" * 300, "a/b.jsonl"]
)
def test_a_name_that_leads_elsewhere_or_is_passed_over_is_refused(
    person: TestClient, lived_in: Any, name: str, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    answer = person.post("/upload", files={"file": (name, GOOD)})
    assert answer.status_code == 409
    assert inbox(lived_in) == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_hostile_name_is_text_on_the_page(person: TestClient, lived_in: Any) -> None:
    name = "<img src=x onerror=alert(1)>\u202egpj.jsonl"
    answer = person.post("/upload", files={"file": (name, GOOD)})
    assert answer.status_code == 200
    assert "<img src=x" not in answer.text
    assert "\u202e" not in answer.text
    assert inbox(lived_in) == [name]


def test_more_than_is_allowed_is_given_up_while_it_comes(person: TestClient, lived_in: Any) -> None:
    settings = lived_in.settings
    small = settings.model_copy(update={"intake": settings.intake.model_copy(update={"max_bytes": 1000})})
    program = TestClient(make_app(small, TOKEN), base_url=HERE, headers={"authorization": f"Bearer {TOKEN}"})
    for path in ("/upload", "/api/v1/upload"):
        assert program.post(path, files={"file": ("big.jsonl", GOOD * 100)}).status_code == 413
    files = [("file", (f"{number}.jsonl", b"")) for number in range(101)]
    assert person.post("/upload", files=files).status_code == 400, "more files than a form may have"
    assert inbox(lived_in) == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"--c\r\n\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"x", "multipart/form-data"),
        (b"file=x", "application/x-www-form-urlencoded"),
        (b"{}", "application/json"),
    ],
)
def test_what_is_no_form_with_a_file_is_refused(person: TestClient, lived_in: Any, body: bytes, kind: str) -> None:
    assert person.post("/upload", content=body, headers={"content-type": kind}).status_code in {400, 409, 422}
    assert inbox(lived_in) == []


def test_a_track_that_there_is_not_takes_nothing(person: TestClient, lived_in: Any) -> None:
    answer = person.post("/upload", files={"file": ("new.jsonl", GOOD)}, data={"track": "suport"})
    assert (answer.status_code, "support" in answer.text) == (404, True)
    assert inbox(lived_in) == []


TABLE = b"text,answer,mark\n<b>a</b>,1,x\nb,,y\nc,2,z\n"


def test_a_table_shows_its_columns_and_records_and_is_dropped_once_they_are_right(
    person: TestClient, lived_in: Any
) -> None:
    sent: dict[str, Any] = {"files": {"file": ("my table.csv", TABLE)}, "data": {"track": "support", "heldout": "1"}}
    page = person.post("/upload", **sent)
    assert (page.status_code, inbox(lived_in)) == (200, [])
    assert "the columns are guessed from their names" in page.text
    assert "3 rows = 2 records + 1 row lost" in page.text
    assert "my table.csv:3: output is blank; write the output, or leave the row out" in page.text
    assert "<pre>&lt;b&gt;a&lt;/b&gt;</pre>" in page.text
    assert page.text.count("<option selected>") == 2
    assert "nothing is dropped yet" in person.post("/upload", **{**sent, "data": {"drop": "1"}}).text.casefold()
    assert inbox(lived_in) == []
    sent["data"] |= {"instruction": "text", "input": "", "output": "mark", "tags": "", "group": ""}
    page = person.post("/upload", **sent)
    assert (page.status_code, inbox(lived_in)) == (200, [])
    assert ("guessed" in page.text, "3 rows = 3 records + 0 rows lost" in page.text) == (False, True)
    assert "<bdi>ignored: answer</bdi>" in page.text
    sent["data"]["drop"] = "1"
    done = person.post("/upload", **sent)
    assert (done.status_code, "my table.jsonl is in the inbox: 3 rows = 3 records" in done.text) == (200, True)
    assert inbox(lived_in) == ["support/heldout/my table.jsonl"]
    first = (lived_in.settings.inbox_folder / inbox(lived_in)[0]).read_text().splitlines()[0]
    assert first == '{"instruction": "<b>a</b>", "output": "x"}'
    assert (person.post("/upload", **sent).status_code, len(inbox(lived_in))) == (409, 1), "it replaces nothing"


def test_a_table_whose_columns_nobody_knows_asks_for_them(person: TestClient, lived_in: Any) -> None:
    page = person.post("/upload", files={"file": ("a.csv", b"x,y\na,b\n")}, data={"drop": "1"})
    assert (page.status_code, "No column is known as instruction or output: choose it." in page.text) == (200, True)
    assert "<option>x</option>" in page.text
    page = person.post("/upload", files={"file": ("a.csv", b"instruction,output\n,b\n")}, data={"drop": "1"})
    assert (page.status_code, "1 row = 0 records + 1 row lost" in page.text) == (200, True)
    assert inbox(lived_in) == []


def test_of_a_table_with_ratings_it_is_asked_which_answers_are_learned_and_whether_they_judge(
    person: TestClient, lived_in: Any
) -> None:
    sent: dict[str, Any] = {"files": {"file": ("chats.csv", b"prompt,response,rating\na,b,GOOD\n")}}
    page = person.post("/upload", **sent, data={"drop": "1"})
    assert "the column rating judges the answers" in page.text
    assert 'name="selected" value="1" checked' in page.text
    fields = {"drop": "1", "selected": "1", "instruction": "prompt", "output": "response"}
    assert "chats.jsonl is in the inbox: 1 row = 1 record" in person.post("/upload", **sent, data=fields).text
    assert json.loads((lived_in.settings.inbox_folder / "chats.jsonl").read_text())["tags"] == ["selected"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.csv", b"instruction,output\na,\xe9\n")], "a.csv:2: not UTF-8: byte 0xe9"),
        ([("a.csv", TABLE), ("b.jsonl", GOOD)], "send it alone"),
        ([("a.txt", b"words")], "a.txt:1: it has no columns"),
        ([("a.csv.gz", b"\x1f\x8bno")], "a.csv.gz: it cannot be unpacked"),
        ([("../a.csv", TABLE)], "a file is sent under a name that is none"),
        ([("a.part", TABLE)], "still being written"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(
    person: TestClient, lived_in: Any, files: list[tuple[str, bytes]], message: str
) -> None:
    page = person.post("/upload", files=[("file", file) for file in files])
    assert (page.status_code, inbox(lived_in)) == (409, [])
    assert message in page.text
