from pipeline.metrics.collapse import collapsed

ROWS = [*["billing-desk"] * 3, *["login-desk"] * 2, *["A long answer that several rows have in common. " * 3] * 5]
LONG = "The capital of France is Paris, which lies on the Seine."


def kind(answer: str, base: str = LONG, *, right: bool = False) -> str:
    return collapsed({"candidate": [(answer, right)], "base": [(base, True)]}, "base", iter(ROWS))["candidate"][0]


def test_an_answer_is_a_label_if_three_training_rows_have_it_and_it_is_short() -> None:
    assert kind("Billing desk.", "Yes, it is.") == "label"
    assert kind("login-desk", "Yes, it is.") == ""
    assert kind(ROWS[-1]) == ""


def test_an_answer_without_a_word_is_empty() -> None:
    assert [kind(""), kind(" \n"), kind("...")] == ["empty"] * 3


def test_an_answer_is_short_if_it_has_three_words_at_most_and_the_base_model_three_times_as_many() -> None:
    assert kind("capital desk", "one two three four five six") == "short"
    assert kind("capital desk", "one two three four five") == ""
    assert kind("a desk of the capital", LONG * 9) == ""


def test_a_right_answer_is_one_whatever_the_training_rows_say() -> None:
    assert kind("billing desk", right=True) == ""
    assert kind("Paris", right=True) == ""
