"""Near-duplicates are found as all pairs would find them: exact Jaccard of 3-word shingles, any run of 13 words."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.tokens import tokens
from pipeline.prepare.near_duplicates import RunIndex, SimilarityIndex, Text, long_runs, shingles, words

ROW = st.lists(st.sampled_from("abcd"), max_size=18)
ROWS = st.lists(ROW, max_size=10)
Row = list[str]


def runs(row: Row, size: int) -> set[tuple[str, ...]]:
    return {tuple(row[place : place + size]) for place in range(len(row) - size + 1)}


def every_shingle(row: Row) -> set[tuple[str, ...]]:
    return runs(row, 3) or ({tuple(row)} if row else set())


def alike(one: Row, other: Row, similarity: float, common: set[tuple[str, ...]]) -> bool:
    """Compute the definition itself."""
    left, right = every_shingle(one) - common, every_shingle(other) - common
    shared = len(left & right)
    partly = bool((every_shingle(one) | every_shingle(other)) & common)
    return bool(left | right) and shared >= (3 if partly else 1) and shared / len(left | right) >= similarity - 1e-12


@given(
    asked=ROWS,
    ours=ROWS,
    similarity=st.sampled_from([0.1, 0.3, 0.5, 2 / 3, 0.9, 1.0]),
    common=st.sets(st.tuples(*[st.sampled_from("abcd")] * 3), max_size=6),
)
def test_similar_texts_are_those_that_all_pairs_give(
    asked: list[Row], ours: list[Row], similarity: float, common: set[tuple[str, ...]]
) -> None:
    def text(row: Row) -> Text:
        return Text(row, shingles(row), shingles(row) - {hash(run) for run in common})

    index = SimilarityIndex(similarity)
    for number, row in enumerate(ours):
        index.add(number, text(row))
    found = [index.find(text(row)) for row in asked]
    wanted = [{number for number, two in enumerate(ours) if alike(one, two, similarity, common)} for one in asked]
    assert found == wanted


PIECES = st.lists(
    st.builds(
        lambda start, size, end: [*map(str, range(start, start + size)), *end],
        st.integers(0, 4),
        st.integers(0, 40),
        ROW,
    ),
    max_size=6,
)


@given(asked=PIECES, ours=PIECES, data=st.data())
def test_texts_that_share_a_long_run_are_those_that_all_pairs_give(
    asked: list[Row], ours: list[Row], data: st.DataObject
) -> None:
    def text(row: Row) -> Text:
        return Text(row, shingles(row), shingles(row))

    every = sorted(set().union(*(long_runs(row) for row in ours)))
    common = set(data.draw(st.lists(st.sampled_from(every), max_size=3))) if every else set()
    index, joined = RunIndex(common), list[Row]()
    for row in ours:
        if not index.find(text(row)):
            index.add(len(joined), text(row))
            joined.append(row)
    for row in asked:
        own = long_runs(row) - common
        assert index.find(text(row)) == {number for number, other in enumerate(joined) if own & long_runs(other)}


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
