"""Each conversion that is offered runs on files as they lie there, and what it writes is accepted."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.records.file_formats import foreign_format
from pipeline.records.validate import Options, validate


def turns(who: str, says: str, *pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{who: role, says: words} for role, words in pairs]


def share(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"id": "x", "conversations": turns("from", "value", *pairs)}


def chat(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": turns("role", "content", *pairs)}


PARTS = [{"type": "text", "text": "One"}, {"type": "text", "text": "two?"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "What is it?"}]
FORMS: dict[str, tuple[list[Any], list[tuple[str, str]]]] = {
    "ShareGPT": (
        [
            share(("system", "Be kind."), ("human", "a?"), ("gpt", "b"), ("human", "c?"), ("gpt", "d")),
            share(("human", "tool?"), ("function_call", "{}"), ("observation", "7"), ("gpt", "It is 7.")),
            share(("gpt", "Hello"), ("human", "a?"), ("gpt", "b")),
            share(("user", "e?"), ("assistant", "f")),
            share(("human", " "), ("gpt", "b")),
            {"conversations": []},
            {"conversations": None},
            "no object",
        ],
        [("a?", "b"), ("e?", "f")],
    ),
    "OpenAI": (
        [
            chat(("system", "Be kind."), ("developer", "Be short."), ("user", "a?"), ("assistant", "b"), ("user", "c")),
            chat(("user", PARTS), ("assistant", PARTS[:1])),
            chat(("user", IMAGE), ("assistant", "a cat")),
            chat(("user", "tool?"), ("assistant", None), ("tool", "7"), ("assistant", "It is 7.")),
        ],
        [("a?", "b"), ("One\ntwo?", "One")],
    ),
}


@pytest.mark.parametrize("is_array", [False, True], ids=["lines", "array"])
@pytest.mark.parametrize("form", FORMS)
def test_a_conversion_gives_what_it_says_and_is_accepted(tmp_path: Path, form: str, *, is_array: bool) -> None:
    content, wanted = FORMS[form]
    file = tmp_path / "FILE"
    file.write_text(json.dumps(content) if is_array else "".join(json.dumps(row) + "\n" for row in content))
    remedies = {finding.remedy for finding in validate(file, Options()).findings if finding.rule == "format"}
    commands = [remedy for remedy in remedies if "jq -c" in remedy]
    assert commands
    for remedy in commands:
        assert "lost" in remedy
        subprocess.run(["sh", "-c", remedy[remedy.index("jq -c") :]], cwd=tmp_path, check=True)
        made = validate(tmp_path / "NEW.jsonl", Options())
        assert (made.ok, made.rows) == (True, len(wanted)), made.reason
        rows = [json.loads(line) for line in (tmp_path / "NEW.jsonl").read_text().splitlines()]
        assert [(row["instruction"], row["output"]) for row in rows] == wanted


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_table_is_converted_with_python_alone(tmp_path: Path, separator: str) -> None:
    lines = [("instruction", "output"), ("café?", "b"), ('"c\nd"', "e")]
    (tmp_path / "FILE").write_text("".join(separator.join(cells) + "\n" for cells in lines), encoding="utf-8")
    found = foreign_format((tmp_path / "FILE").read_bytes())
    assert found is not None
    subprocess.run(["sh", "-c", re.sub("^convert it: ", "", found.remedy)], cwd=tmp_path, check=True)
    made = validate(tmp_path / "NEW.jsonl", Options())
    assert (made.ok, made.rows) == (True, 2), made.reason
