"""The words that near-duplicates are found by are those of the metrics, only faster."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.tokens import tokens
from pipeline.prepare.near_duplicates import word_hashes
from pipeline.prepare.near_duplicates.word_hashes import WordHasher

TRICKY = (
    "Straße", "日本語 text", "ไทย", "한국어", "e\u0301", " \u0301x", "\u00b4", "\u200d", "🙂🙂",
    "a\u00a0b", "x\u2028y", "ﬁ", "İ", "don't", "A-B_c", "\u1e9e", "नमस्ते दुनिया",
)  # fmt: skip
MIXED = st.lists(st.text(max_size=8) | st.sampled_from(TRICKY)).map(" ".join)


@given(text=MIXED | st.text())
def test_they_are_the_words_of_the_metrics(text: str) -> None:
    assert WordHasher().hashes(text) == [zlib.crc32(word.encode()) for word in tokens(text)]


def test_what_is_remembered_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_hashes, "_MOST_KNOWN", 3)
    hasher = WordHasher()
    texts = ["a b c d e f g", "é à ü ö ä", "日本語", "a b"] * 3
    assert [hasher.hashes(text) for text in texts] == [WordHasher().hashes(text) for text in texts]
    assert len(hasher._words) <= 3
    assert len(hasher._pieces) <= 3
    WordHasher().hashes("x" * 65 + "é" * 65)
