"""Batches for likelihoods and choices: as large as their own logits allow."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.generation import choice_batches, likelihood_batches

SIZE = 32
#: With this vocabulary the float32 logits of 64 tokens reach the limit of a batch.
VOCABULARY = (1 << 28) // 4 // 64


def test_a_long_reference_makes_no_other_batch_smaller() -> None:
    pairs = [([1], [2] * (60 if number == 7 else 1)) for number in range(65)]
    sizes = [len(batch) for batch in likelihood_batches(pairs, SIZE, VOCABULARY)]
    assert sizes == [1, 32, 32]
    questions = [([1], [[2] * (60 if number == 7 else 1)] * 2) for number in range(65)]
    assert [len(batch) for batch in choice_batches(questions, SIZE, VOCABULARY)] == [1, 32, 32]
    many = [([1], [[2]] * (64 if number == 7 else 2)) for number in range(65)]
    assert sorted(len(batch) for batch in choice_batches(many, SIZE, VOCABULARY))[-2:] >= [25, 32]


@given(st.lists(st.lists(st.integers(1, 80), min_size=1, max_size=4)))
def test_each_batch_has_logits_that_fit_or_a_single_item(lengths: Sequence[Sequence[int]]) -> None:
    pairs = [([1] * sum(row), [2] * row[0]) for row in lengths]
    questions = [([1] * sum(row), [[2] * length for length in row]) for row in lengths]
    for batches, widths in (
        (likelihood_batches(pairs, SIZE, VOCABULARY), [[row[0] + 1] for row in lengths]),
        (choice_batches(questions, SIZE, VOCABULARY), lengths),
    ):
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            rows = [width for index in batch for width in widths[index]]
            assert len(batch) == 1 or (len(batch) <= SIZE and len(rows) * max(rows) <= 64)
