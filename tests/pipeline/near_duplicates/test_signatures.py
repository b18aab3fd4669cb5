"""The signatures of a drop are read as they were written, block by block, and a damaged file is known."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.near_duplicates import signatures
from pipeline.near_duplicates.signature_files import VERSION, signature_name, signed_drop
from pipeline.near_duplicates.signatures import SignatureWriter, holds, read_blocks
from pipeline.near_duplicates.word_hashes import WordHasher

ROWS = [("Do it", f"to the text {number}", "word " * (number % 12)) for number in range(10)]


def write(path: Path) -> Path:
    with SignatureWriter(path, WordHasher()) as writer:
        for row in ROWS:
            writer.add(*row)
    return path


@pytest.mark.parametrize(("limit", "value"), [("_BLOCK_ROWS", 4), ("_BLOCK_WORDS", 13), ("_BLOCK_ROWS", 100)])
def test_rows_come_back_with_the_words_of_their_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(signatures, limit, value)
    blocks = list(read_blocks(write(tmp_path / "a.zip")))
    rows = np.concatenate([block.rows for block in blocks])
    hasher = WordHasher()
    words = [word for row in ROWS for word in hasher.hashes(f"{row[0]} {row[1]}")]
    assert np.concatenate([block.words for block in blocks]).tolist() == words
    assert rows["words"].tolist() == [6] * 10
    assert rows["instruction_words"].tolist() == [2] * 10
    assert len(set(rows["instruction"].tolist())) == 1
    assert [bool(answer) for answer in rows["answer"]] == [number >= 8 for number in range(10)]
    assert len(blocks) == (1 if value == 100 else 3 if value == 4 else 4)
    assert [block.first for block in blocks] == np.cumsum([0, *(len(block.rows) for block in blocks)])[:-1].tolist()


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a.zip").read_bytes() == write(tmp_path / "b.zip").read_bytes()


def test_only_a_whole_file_of_so_many_rows_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip")
    data = path.read_bytes()
    assert holds(path, 10)
    assert not holds(path, 9)
    assert not holds(tmp_path / "none.zip", 10)
    for place in range(0, len(data), 37):
        path.write_bytes(data[:place])
        assert not holds(path, 10), place
    middle = data.index(np.array([zlib_of("text")], "<u4").tobytes())
    path.write_bytes(data[:middle] + b"\xff" + data[middle + 1 :])
    assert not holds(path, 10)


def test_no_bit_that_turns_breaks_more_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip")
    data = path.read_bytes()
    whole = [(block.rows.tobytes(), block.words.tobytes()) for block in read_blocks(path)]
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if holds(path, 10):
            assert [(block.rows.tobytes(), block.words.tobytes()) for block in read_blocks(path)] == whole, place


def zlib_of(word: str) -> int:
    return WordHasher().hashes(word)[0]


def test_a_file_that_was_cut_off_by_an_error_does_not_hold(tmp_path: Path) -> None:
    def fail() -> None:
        with SignatureWriter(tmp_path / "a.zip", WordHasher()) as writer:
            writer.add(*ROWS[0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not holds(tmp_path / "a.zip", 1)


def test_the_name_tells_drop_and_version() -> None:
    assert signed_drop(signature_name("abc")) == "abc"
    assert signed_drop(f"abc-{VERSION}x.zip") is None
    assert signed_drop("abc-v0.zip") is None
