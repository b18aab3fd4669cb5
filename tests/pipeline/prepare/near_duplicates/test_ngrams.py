"""Runs of words have equal hashes where they are equal, and counts of rows are exact."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare.near_duplicates import ngrams
from pipeline.prepare.near_duplicates.ngrams import (
    FrequentHashes,
    HashFilter,
    Texts,
    cut,
    distinct,
    join,
    members,
    shingles,
)

WORDS = st.lists(st.lists(st.integers(0, 4), max_size=20), max_size=8)


def texts(rows: list[list[int]]) -> Texts:
    starts = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
    return Texts(np.array([word for row in rows for word in row], np.uint32), starts)


def runs(rows: list[list[int]], size: int) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (number, tuple(row[place : place + size]))
        for number, row in enumerate(rows)
        for place in range(len(row) - size + 1)
    ]


@given(rows=WORDS, size=st.integers(1, 14))
def test_runs_have_the_same_hash_if_and_only_if_they_are_the_same(rows: list[list[int]], size: int) -> None:
    hashes, places = ngrams.ngrams(texts(rows), size)
    wanted = runs(rows, size)
    assert places.tolist() == [number for number, _run in wanted]
    assert len(set(zip([run for _number, run in wanted], hashes.tolist(), strict=True))) == len(
        {run for _number, run in wanted}
    )
    assert len(set(hashes.tolist())) == len({run for _number, run in wanted})


@given(rows=WORDS)
def test_a_text_that_is_shorter_than_a_shingle_is_one_as_a_whole(rows: list[list[int]]) -> None:
    hashes, places = shingles(texts(rows), 3)
    wanted = runs(rows, 3) + [(number, tuple(row)) for number, row in enumerate(rows) if 0 < len(row) < 3]
    assert Counter(places.tolist()) == Counter(number for number, _run in wanted)
    assert len(set(hashes.tolist())) == len({run for _number, run in wanted})


@given(rows=WORDS, data=st.data())
def test_texts_are_taken_and_joined_in_the_order_that_is_asked_for(rows: list[list[int]], data: st.DataObject) -> None:
    whole = texts(rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []
    taken = join([whole.take(np.array([number], np.int64)) for number in chosen])
    picked = whole.take(np.array(chosen, np.int64))
    for found in (taken, picked):
        parts = np.split(found.words, found.starts[1:-1]) if len(found) else []
        assert [part.tolist() for part in parts] == [rows[number] for number in chosen]
    assert len(cut(whole.words, whole.starts[:-1], whole.lengths)) == len(rows)


@given(
    rows=st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12), most=st.integers(0, 4), bits=st.booleans()
)
def test_frequent_hashes_are_counted_by_row_and_exactly(rows: list[list[int]], most: int, *, bits: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # With one bit nearly all hashes fall together: the second pass must still be exact.
        patch.setattr(ngrams, "_SKETCH_BITS", 1 if bits else 22)
        frequent = FrequentHashes(most)
        parts = [texts(rows[:5]), texts(rows[5:])]
        for part in parts:
            frequent.note(ngrams.ngrams(part, 1)[0])
        for part in parts:
            frequent.count(*ngrams.ngrams(part, 1))
        counts = Counter(word for row in rows for word in set(row))
        wanted = [word for word, count in counts.items() if count > most]
        hashes = ngrams.ngrams(texts([wanted]), 1)[0]
    assert frequent.found().tolist() == sorted(hashes.tolist())


@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5))), known=st.sets(st.integers(0, 5)))
def test_pairs_are_sorted_and_once_each_and_membership_is_exact(pairs: list[tuple[int, int]], known: set[int]) -> None:
    hashes, rows = distinct(np.array([h for _r, h in pairs], np.uint64), np.array([r for r, _h in pairs], np.int64))
    assert list(zip(rows.tolist(), hashes.tolist(), strict=True)) == sorted(set(pairs))
    asked = np.arange(8, dtype=np.uint64)
    assert members(asked, np.array(sorted(known), np.uint64)).tolist() == [number in known for number in range(8)]
    assert HashFilter(hashes).passes(hashes).all()
