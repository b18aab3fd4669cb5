"""Near texts are found as all pairs would find them: exact Jaccard of 3-word shingles, any run of 13 words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare.near_duplicates import jaccard
from pipeline.prepare.near_duplicates.jaccard import Boilerplate, NearTexts
from pipeline.prepare.near_duplicates.ngrams import Hashes, Texts
from pipeline.prepare.near_duplicates.ngrams import ngrams as hash_runs

ROW = st.lists(st.integers(0, 3), max_size=18)
ROWS = st.lists(ROW, max_size=10)
Row = list[int]
Shingle = tuple[int, ...]


def texts(rows: list[Row]) -> Texts:
    starts = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
    return Texts(np.array([word for row in rows for word in row], np.uint32), starts)


def runs(row: Row, size: int) -> set[Shingle]:
    return {tuple(row[place : place + size]) for place in range(len(row) - size + 1)}


def shingles(row: Row) -> set[Shingle]:
    return runs(row, 3) or ({tuple(row)} if row else set())


def hashes(wanted: set[Shingle], size: int) -> Hashes:
    return np.sort(hash_runs(texts([list(run) for run in wanted]), size)[0])


def alike(one: Row, other: Row, similarity: float, common: set[Shingle]) -> bool:
    """Compute the definition itself."""
    left, right = shingles(one) - common, shingles(other) - common
    shared = len(left & right)
    partly = bool((shingles(one) | shingles(other)) & common)
    return bool(left | right) and shared >= (3 if partly else 1) and shared / len(left | right) >= similarity - 1e-12


@given(
    asked=ROWS,
    ours=ROWS,
    similarity=st.sampled_from([0.1, 0.3, 0.5, 2 / 3, 0.9, 1.0]),
    common=st.sets(st.tuples(*[st.integers(0, 3)] * 3), max_size=6),
    at_once=st.sampled_from([1, 7, 1 << 22]),
)
def test_similar_texts_are_those_that_all_pairs_give(
    asked: list[Row], ours: list[Row], similarity: float, common: set[Shingle], at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaccard, "_MOST_AT_ONCE", at_once)
        near = NearTexts(texts(ours), Boilerplate(hashes(common, 3), np.zeros(0, np.uint64)), similarity)
        theirs, mine = near.similar(texts(asked))
    wanted = [
        (number, other)
        for number, one in enumerate(asked)
        for other, two in enumerate(ours)
        if alike(one, two, similarity, common)
    ]
    assert list(zip(theirs.tolist(), mine.tolist(), strict=True)) == wanted


PIECES = st.lists(
    st.builds(lambda start, size, end: [*range(start, start + size), *end], st.integers(0, 4), st.integers(0, 16), ROW),
    max_size=6,
)


@given(asked=PIECES, ours=PIECES, data=st.data())
def test_the_first_text_with_a_long_run_in_common_is_named(
    asked: list[Row], ours: list[Row], data: st.DataObject
) -> None:
    every = sorted(set().union(*(runs(row, 13) for row in ours)))
    common = set(data.draw(st.lists(st.sampled_from(every), max_size=3))) if every else set()
    near = NearTexts(texts(ours), Boilerplate(np.zeros(0, np.uint64), hashes(common, 13)), 0.5)
    wanted = {
        (place, next(number for number, row in enumerate(ours) if run in runs(row, 13)))
        for place, one in enumerate(asked)
        for run in runs(one, 13)
        if run in every and run not in common
    }
    assert list(zip(*map(np.ndarray.tolist, near.sharing_runs(texts(asked))), strict=True)) == sorted(wanted)
