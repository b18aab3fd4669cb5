import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.degenerate import collapsed, degenerate, is_looping


@pytest.mark.parametrize(
    "text",
    [
        "the cat the cat the cat the cat",
        "!!!!!!!!!!!!!!!!!!!!!!!!",
        "The answer is four. The answer is four. The answer is four. The ans",
        "Well, I would say: and so on and so on and so on and so on and so on and so on",
        "我不知道。我不知道。我不知道。我不知道。我不知道。",
        "ฉันไม่รู้ฉันไม่รู้ฉันไม่รู้ฉันไม่รู้",
        "- a\n\n- a\n\n- a\n\n- a\n\n- a\n\n- a\n\n- a",
    ],
)
def test_a_phrase_that_fills_half_of_an_answer_or_more_is_a_loop_in_any_script(text: str) -> None:
    assert is_looping(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1000000",
        "ha ha ha",
        "The cat sat on the mat, the dog sat on the cat, and the mouse sat on the dog all day.",
        "I say it once, I say it twice: and on and on and on and on. Then a long story begins which has nothing of it.",
        "two times the same phrase, two times the same phrase,",
        '{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}',
    ],
)
def test_other_answers_are_none(text: str) -> None:
    assert not is_looping(text)


def by_definition(text: str) -> bool:
    """Look at every stretch of the text and every period."""
    signs = " ".join(text.split())
    for first in range(len(signs)):
        for last in range(first + 20, len(signs) + 1):
            part = signs[first:last]
            if 2 * len(part) < len(signs):
                continue
            for period in range(1, len(part) // 3 + 1):
                if all(part[place] == part[place - period] for place in range(period, len(part))):
                    return True
    return False


@given(
    st.text("ab ", max_size=20), st.text("ab ", min_size=1, max_size=6), st.integers(1, 12), st.text("ab", max_size=20)
)
def test_the_short_way_finds_what_the_definition_says(before: str, phrase: str, times: int, after: str) -> None:
    text = before + phrase * times + after
    assert is_looping(text) == by_definition(text)


def test_an_answer_is_empty_cut_off_or_a_loop_and_may_be_two_of_these() -> None:
    assert degenerate("yes", ["yes"], ended=True) == []
    assert degenerate(" \n", ["yes"], ended=True) == ["empty"]
    assert degenerate("yes", ["yes"], ended=False) == ["truncated"]
    assert degenerate("yes no " * 20, ["yes"], ended=False) == ["truncated", "looping"]


def test_an_answer_that_is_to_repeat_itself_is_no_loop() -> None:
    song = "row row " * 10
    assert degenerate(song, ["short", song], ended=True) == []


# Answers to general questions.

ROWS = [*["billing-desk"] * 3, *["login-desk"] * 2, *["A long answer that several rows have in common. " * 3] * 5]
LONG = "The capital of France is Paris, which lies on the Seine."


@pytest.mark.parametrize(
    ("answer", "base", "kind"),
    [
        # A label is short, and three training rows have it.
        ("Billing desk.", "Yes, it is.", "label"),
        ("login-desk", "Yes, it is.", ""),
        (ROWS[-1], LONG, ""),
        *((text, LONG, "empty") for text in ("", " \n", "...")),
        # A short answer has three words at most, and the base model's three times as many.
        ("capital desk", "one two three four five six", "short"),
        ("capital desk", "one two three four five", ""),
        ("a desk of the capital", LONG * 9, ""),
    ],
)
def test_an_answer_collapses_to_a_label_to_nothing_or_to_a_short_one_unless_it_is_right(
    answer: str, base: str, kind: str
) -> None:
    for right, expected in ((False, kind), (True, "")):
        found = collapsed({"candidate": [(answer, right)], "base": [(base, True)]}, "base", iter(ROWS))
        assert found["candidate"] == [expected]
