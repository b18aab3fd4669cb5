"""Each conversion that is offered runs on files as they lie there, and what it writes is accepted."""

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.records.file_formats import foreign_format, name_file
from pipeline.records.validate import Options, validate

FILES = {"array": '\ufeff[{"instruction": "café?", "output": "b"},\n {"instruction": "c", "output": "e"}]'}


@pytest.mark.parametrize("kind", FILES)
def test_an_array_is_converted_with_python_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "it's mine.txt").write_text(FILES[kind], encoding="utf-8")
    found = foreign_format((tmp_path / "it's mine.txt").read_bytes())
    assert found is not None
    command = name_file(found.remedy, "it's mine.txt")
    assert not set('"\\') & set(command.replace("""'"'"'""", "")), "an error list is JSON: it is copied as it stands"
    subprocess.run(["sh", "-c", re.sub("^convert it: ", "", command)], cwd=tmp_path, check=True)
    made = validate(tmp_path / "it's mine.jsonl", Options())
    assert (made.ok, made.rows) == (True, 2), made.reason


@pytest.mark.parametrize(
    ("content", "command"),
    [
        (b"PAR1", "convert it: dropforge convert notes.jsonl"),
        (b"\x1f\x8b", "convert it: dropforge convert notes.jsonl"),
        (b'{\n "instruction": "q"\n}', "jq -c . notes.jsonl > notes-new.jsonl"),
        (b'{"instruction": "q", "output": "\xe9"}', "iconv -f WINDOWS-1252 -t UTF-8 notes.jsonl > notes-new.jsonl"),
    ],
)
def test_the_commands_of_remedies_name_the_file(tmp_path: Path, content: bytes, command: str) -> None:
    (tmp_path / "0f3a.tmp").write_bytes(content)
    (found,) = validate(tmp_path / "0f3a.tmp", Options(path="notes.jsonl")).findings
    assert command in found.remedy
