"""Rows that ask what pinned records ask are counted, however they are written."""

import json
from pathlib import Path

from pipeline.dataset.pinned_prompts import count_pinned
from tests.snapshot import rows


def write(path: Path, content: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_a_prompt_is_the_same_folded_or_not_in_any_case_and_with_any_answer(tmp_path: Path) -> None:
    pinned = [{"instruction": "Say it.", "input": "One  line", "output": "x"}, *rows(3)]
    one, other = write(tmp_path / "one", pinned), write(tmp_path / "other", rows(2, start=50))
    same = [{"instruction": "SAY it.\n\n### Input:\none line", "output": "y"}, *rows(2, start=51), *rows(2, start=90)]
    assert count_pinned(write(tmp_path / "new", same), [one]) == 1
    assert count_pinned(write(tmp_path / "new", [*rows(5), *rows(4, start=50)]), [one, other]) == 3 + 2
    assert count_pinned(tmp_path / "new", []) == 0
    assert count_pinned(tmp_path / "new", [tmp_path / "gone", other]) == 2
