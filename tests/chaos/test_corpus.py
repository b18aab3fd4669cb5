"""Each kind of bad file gives the one finding that is meant for it, and files that only look odd are fine."""

from pathlib import Path

import pytest

from pipeline.records.validate import Options, good_rows, validate
from tests.chaos.corpus import OPTIONS, PLAINER, Case, bad_files, clean_files

BAD, CLEAN = bad_files(), clean_files()


@pytest.mark.parametrize("case", BAD, ids=[case.kind for case in BAD])
def test_a_bad_file_gives_exactly_the_finding_that_is_meant_for_it(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "drop.jsonl"
    path.write_bytes(case.data)
    found = validate(path, case.options)
    assert [(finding.rule, finding.line, finding.field) for finding in found.findings] == [
        (case.rule, case.line, case.field)
    ]
    finding = found.findings[0]
    assert (found.findings_total, found.ok) == (1, False)
    assert finding.message.isprintable()
    assert finding.remedy
    assert len(finding.message) + len(finding.remedy) < 600
    assert found.good_rows == len(list(good_rows(path, case.options)))
    if case.options == OPTIONS and "sentence" not in case.kind:  # a token beyond ASCII
        assert validate(path, PLAINER) == found


@pytest.mark.parametrize("options", [OPTIONS, PLAINER], ids=["", "plainer"])
@pytest.mark.parametrize("kind", CLEAN)
def test_a_clean_file_is_fine(tmp_path: Path, kind: str, options: Options) -> None:
    path = tmp_path / "drop.jsonl"
    path.write_bytes(CLEAN[kind])
    found = validate(path, options)
    assert (found.findings, found.ok) == ((), True)
    assert found.rows == found.good_rows == len(list(good_rows(path, OPTIONS))) > 0
    # Some repeat a row, which is no mistake.
    keys = {key for notice in found.warnings for key in notice.keys}
    unused = {"other keys": {"id", "meta", "label"}, "empty system and history": {"chosen"}, "ShareGPT": {"tools"}}
    talk = {"messages.tool_calls"} if kind in {"OpenAI", "array of messages"} else set()
    assert keys == unused.get(kind, talk)
