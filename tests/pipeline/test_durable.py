"""Durable files: whole or not there."""

from pathlib import Path

import pytest

from pipeline import durable


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    durable.write_json(path, {"old": True})

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_json(path, {"old": False})
    assert durable.read_json(path) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_value_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_published_once(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    durable.publish_folder(tmp_path / "first", tmp_path / "target")
    durable.publish_folder(tmp_path / "second", tmp_path / "target")
    assert (tmp_path / "target" / "weights").read_text() == "first"
    assert (tmp_path / "second").is_dir()


def test_our_json_lines_are_split_on_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert [row["text"] for row in durable.read_jsonl(path)] == ["a\u2028b", "c"]
