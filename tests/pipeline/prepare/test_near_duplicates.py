"""The words of near-duplicates are those of the metrics, found in another way (what is found: test_decontaminate)."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.tokens import tokens
from pipeline.prepare.near_duplicates import words

TRICKY = (
    "Straße",
    "日本語 text",
    "ไทย",
    "한국어",
    "e\u0301",
    " \u0301x",
    "\u00b4",
    "\u200d",
    "🙂🙂",
    "a\u00a0b",
    "x\u2028y",
    "ﬁ",
    "İ",
    "don't",
    "A-B_c",
    "\u1e9e",
    "नमस्ते दुनिया",
    "é" * 65,
)
MIXED = st.lists(st.text(max_size=8) | st.sampled_from(TRICKY)).map(" ".join)


@given(text=MIXED | st.text())
def test_words_are_those_of_the_metrics(text: str) -> None:
    assert [*words(text)] == tokens(text)
