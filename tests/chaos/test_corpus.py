"""Each kind of bad file gives the one finding that is meant for it, and files that only look odd are fine."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.records.validate import Options, good_rows, validate
from tests.chaos.corpus import OPTIONS, PLAINER, Case, bad_files, clean_files

SCRIPT = Path(sys.executable).parent / "dropforge"
BAD, CLEAN = bad_files(), clean_files()
WHOLE = os.environ.get("DROPFORGE_CHAOS") == "whole"
SEED = int(os.environ.get("DROPFORGE_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
SAMPLE = 4


def check(folder: Path, name: str) -> tuple[int, str]:
    """Start `dropforge check` as a shell does; return its exit code and what it said."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DROPFORGE_")}
    done = subprocess.run(
        [SCRIPT, "check", name], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def sample(cases: list[Case]) -> list[Case]:
    """Return all that the process is tried on: with DROPFORGE_CHAOS=whole every kind."""
    # Special tokens need a base, and the longest line of a workspace is no setting.
    usual = [case for case in cases if case.options == OPTIONS and case.rule not in {"special_token", "too_long"}]
    return usual if WHOLE else random.Random(SEED).sample(usual, SAMPLE)


def test_each_kind_has_a_name_of_its_own() -> None:
    kinds = [case.kind for case in BAD]
    assert len(set(kinds)) == len(kinds) >= 100
    assert len({case.rule for case in BAD}) >= 15
    assert len(CLEAN) >= 40


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
    if case.options == OPTIONS and "sentence" not in case.kind:
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
    keys = [notice.key for notice in found.warnings if notice.kind != "repeated"]
    assert keys == (["id", "meta"] if kind == "other keys" else [])


def test_the_command_ends_with_65_and_names_the_line(tmp_path: Path) -> None:
    print(f"DROPFORGE_CHAOS_SEED={SEED}")
    (tmp_path / "dropforge.toml").touch()
    for case in sample(BAD):
        (tmp_path / "drop.jsonl").write_bytes(case.data)
        code, said = check(tmp_path, "drop.jsonl")
        assert code == 65, f"{case.kind}: {said}"
        assert ("drop.jsonl: " if case.line is None else f"drop.jsonl:{case.line}: ") in said, case.kind
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drop.jsonl", "dropforge.toml"]


def test_the_command_ends_with_0_for_clean_files(tmp_path: Path) -> None:
    (tmp_path / "dropforge.toml").touch()
    kinds = list(CLEAN) if WHOLE else random.Random(SEED).sample(list(CLEAN), 2)
    for kind in kinds:
        (tmp_path / "drop.jsonl").write_bytes(CLEAN[kind])
        code, said = check(tmp_path, "drop.jsonl")
        assert (code, "it would be accepted" in said) == (0, True), f"{kind}: {said}"
