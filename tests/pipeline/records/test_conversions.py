"""Each conversion that is offered runs on files as they lie there, and what it writes is accepted."""

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.records.file_formats import foreign_format
from pipeline.records.validate import Options, validate

LINES = [("instruction", "output"), ("café?", "b"), ('"c\nd"', "e")]
FILES = {separator: "".join(separator.join(cells) + "\n" for cells in LINES) for separator in ",;\t|"}
FILES["array"] = '\ufeff[{"instruction": "café?", "output": "b"},\n {"instruction": "c", "output": "e"}]'


@pytest.mark.parametrize("kind", FILES)
def test_a_table_or_an_array_is_converted_with_python_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "FILE").write_text(FILES[kind], encoding="utf-8")
    found = foreign_format((tmp_path / "FILE").read_bytes())
    assert found is not None
    subprocess.run(["sh", "-c", re.sub("^convert it: ", "", found.remedy)], cwd=tmp_path, check=True)
    made = validate(tmp_path / "NEW.jsonl", Options())
    assert (made.ok, made.rows) == (True, 2), made.reason
