"""A file of another format is told with the command that makes records of it."""

from pathlib import Path

import pytest

from pipeline.records.validate import Options, validate


@pytest.mark.parametrize(
    ("content", "command"),
    [
        (b"PAR1", "convert it: dropforge convert notes.jsonl"),
        (b"\x1f\x8b", "convert it: dropforge convert notes.jsonl"),
        (b'{\n "instruction": "q"\n}', "jq -c . notes.jsonl > notes-new.jsonl"),
        (b'{"version": 1, "rows": [{"messages": []}]}', "jq -c '.[] | arrays[]' notes.jsonl > notes-new.jsonl"),
        (b'{"instruction": "q", "output": "\xe9"}', "iconv -f WINDOWS-1252 -t UTF-8 notes.jsonl > notes-new.jsonl"),
    ],
)
def test_the_commands_of_remedies_name_the_file(tmp_path: Path, content: bytes, command: str) -> None:
    (tmp_path / "0f3a.tmp").write_bytes(content)
    (found,) = validate(tmp_path / "0f3a.tmp", Options(path="notes.jsonl")).findings
    assert command in found.remedy
