"""The signatures of a drop come back as its rows were added, block by block."""

import numpy as np
import pytest

from pipeline.prepare.near_duplicates import signatures
from pipeline.prepare.near_duplicates.signatures import Signatures
from pipeline.prepare.near_duplicates.word_hashes import WordHasher

ROWS = [("Do it", f"to the text {number}", "word " * (number % 12)) for number in range(10)]


@pytest.mark.parametrize(("limit", "value"), [("_BLOCK_ROWS", 4), ("_BLOCK_WORDS", 13), ("_BLOCK_ROWS", 100)])
def test_rows_come_back_with_the_words_of_their_prompts(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(signatures, limit, value)
    made = Signatures(WordHasher())
    for row in ROWS:
        made.add(*row)
    blocks = list(made.blocks())
    assert [block.first for block in made.blocks()] == [block.first for block in blocks]
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
