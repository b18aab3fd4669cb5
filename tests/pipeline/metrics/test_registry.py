import string

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from pipeline.metrics import tokens
from pipeline.metrics.registry import METRICS

SCRIPTS = {
    "Thai": "สวัสดีครับ ผมกำลังเรียนภาษาไทย",
    "Russian": "Съешь ещё этих мягких французских булок",
    "Chinese": "你好，世界。这是一个测试。",
    "Hindi": "हिन्दी में लिखा हुआ वाक्य",
    "Arabic": "مرحبا بالعالم الجميل",
    "Korean": "한국어 문장을 씁니다",
    "Japanese": "カタカナとひらがなを書く",
    "emoji": "👍 🎉",
    "English": "The quick brown fox.",
}
#: Those that compare texts of any kind.
TEXT = [name for name in METRICS if not name.startswith("json")]


def score_of(name: str, said: str, references: list[str]) -> float:
    (found,) = METRICS[name].scores([said], [references])
    return found


@pytest.mark.parametrize("name", TEXT)
def test_an_identical_answer_scores_one_and_half_of_it_less_in_every_script(name: str) -> None:
    for script, text in SCRIPTS.items():
        assert score_of(name, text, [text]) == 1.0
        if name != "exact_match" and script in {"Thai", "Russian", "Chinese", "Hindi"}:
            assert 0.0 < score_of(name, text[: len(text) // 2], [text]) < 1.0, script


@pytest.mark.parametrize("name", METRICS)
def test_another_answer_and_no_answer_score_zero(name: str) -> None:
    assert score_of(name, "jjj", ["a quick brown fox"]) == 0.0
    assert score_of(name, "", ["a quick brown fox"]) == 0.0


@pytest.mark.parametrize("name", TEXT)
def test_the_nearest_of_several_references_counts_whatever_is_scored_beside_it(name: str) -> None:
    answers = ["quick brown fox", "", "-"]
    references = [["something else", "quick brown fox", "nothing at all"], ["a"], ["-"]]
    assert METRICS[name].scores(answers, references) == [1.0, 0.0, 1.0]
    assert METRICS[name].scores([], []) == []


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_on_english_is_rouge_scores_own(name: str) -> None:
    seeded = np.random.default_rng(4)
    words = ["the", "cat", "sat", "on", "a", "mat", "don't", "U.S.", "3.5", "well-known", "snake_case", "Mixed"]
    answers, references = ([" ".join(seeded.choice(words, 12)) for _ in range(40)] for _ in range(2))
    scorer = rouge_scorer.RougeScorer([name], use_stemmer=False)
    pairs = list(zip(answers, references, strict=True))
    expected = [scorer.score(reference, answer)[name].fmeasure for answer, reference in pairs]
    assert METRICS[name].scores(answers, [[reference] for reference in references]) == pytest.approx(expected)


def test_the_tokens_of_ascii_text_are_the_same_however_they_are_found() -> None:
    seeded = np.random.default_rng(5)
    for _ in range(50):
        text = "".join(seeded.choice(list(string.printable), 60))
        assert tokens.tokens(text) == tokens.tokens(text + " \u00a1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("one two  three", 3),
        ("https://example.org/a/b?c=d 7f3c-11aa-90be", 2),
        ("C'est l'été à Besançon", 4),
        ("Где моя посылка", 3),
        ("제 소포는 어디에 있나요", 4),
        ("私は毎朝七時に起きます。", 5),  # 11 characters
        ("私は毎朝七時に起きました", 6),
        ("ไม่ทราบ", 3),  # 6 letters, one with a mark
        ("ｶｽﾀﾏｰｻﾎﾟｰﾄ", 4),  # 9 characters, half-width
        ("iPhone 手机", 2),
        ("🙂 ！", 2),
    ],
)
def test_words_are_counted_in_any_script(text: str, words: int) -> None:
    assert [tokens.is_short(text, most) for most in range(1, 8)] == [words <= most for most in range(1, 8)]


@pytest.mark.parametrize("beginning", ["https://example.org/" + "a" * 90, "=" * 300, "—" * 3000, "é" * 600])
def test_a_paragraph_is_long_whatever_it_begins_with(beginning: str) -> None:
    paragraph = "这是一个很长的中文段落用来说明问题" * 40
    assert not tokens.is_short(beginning + paragraph, 5)
    assert tokens.is_short(beginning, 5)


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    # Precision 2/3, recall 2/4.
    assert score_of("token_f1", "a b x", ["a b c d"]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert score_of("token_f1", "a a a", ["a"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("  Billing.\n", "billing", 1.0),
        ("**Billing**", "billing", 1.0),
        ("\u201cYes!\u201d", "yes", 1.0),
        ("\uff22\uff49\uff4c\uff4c", "Bill", 1.0),
        ("STRASSE", "stra\u00dfe", 1.0),
        ("two  \t words", "two words", 1.0),
        ("(a)", "a", 1.0),
        ("是的。", "是的", 1.0),
        ("caf\u0065\u0301", "caf\u00e9", 1.0),
        ("-5", "5", 0.0),
        ("50%", "50", 0.0),
        (".5", "5", 0.0),
        ("C#", "C", 0.0),
        ("$5", "5", 0.0),
        ("co-op", "coop", 0.0),
        ("billing now", "billing", 0.0),
        ("?", "!", 0.0),
    ],
)
def test_exact_match_sees_through_case_space_form_and_surrounding_punctuation_but_keeps_what_carries_meaning(
    said: str, wanted: str, score: float
) -> None:
    assert score_of("exact_match", said, [wanted]) == score


def test_marks_and_invisible_signs_stay_with_their_letter() -> None:
    assert tokens.tokens("हिन्दी शब्द") == ["हिन्दी", "शब्द"]
    assert tokens.tokens("می\u200cخواهم") == ["میخواهم"]
    assert tokens.tokens("東京tower・2塔") == ["東", "京", "tower", "2", "塔"]
    assert tokens.tokens("! \u0301 a") == ["a"]


# chrF against sacrebleu's corpus score, which takes another way through that package: a corpus of one is one sentence.


@pytest.mark.parametrize("script", ["Thai", "Arabic", "English"])
def test_chrf_is_sacrebleus_own(script: str) -> None:
    seeded = np.random.default_rng(6)
    signs = list(SCRIPTS[script] + " xyz")
    for _ in range(10):
        answer, one, other = ("".join(seeded.choice(signs, 30)) for _ in range(3))
        expected = sacrebleu.corpus_chrf([answer], [[one], [other]]).score
        assert score_of("chrf", answer, [one, other]) == pytest.approx(expected / 100)


# JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "valid"),
    [
        ('{"a": 1}', 1.0),
        (" [1, 2]\n", 1.0),
        ("{}", 1.0),
        ('```json\n{"a": 1}\n```', 0.0),
        ('{"a": NaN}', 0.0),
        ("3", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_valid_is_a_json_object_or_array_and_nothing_around_it(said: str, valid: float) -> None:
    assert score_of("json_valid", said, ["{}"]) == valid


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1.0),
        ('{"a": 1.0}', '{"a": 1}', 1.0),
        ('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
        ('{"a": 1}', '{"a": 1, "b": 2}', 2 / 3),
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0.5),
        ("[1, 2]", "[2, 1]", 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": []}', '{"a": {}}', 0.0),
        ("{}", "{}", 1.0),
        ('{"a": null}', "{}", 0.0),
        ("nothing", '{"a": 1}', 0.0),
    ],
)
def test_field_f1_counts_paths_with_their_values(said: str, wanted: str, score: float) -> None:
    assert score_of("json_f1", said, [wanted]) == pytest.approx(score)


def test_json_of_any_depth_is_scored_or_taken_for_text_and_breaks_nothing() -> None:
    for depth in range(800, 1020):
        deep = "[" * depth + "]" * depth
        # Near the limit, how deep json reads depends on who calls it.
        assert score_of("json_f1", deep, [deep]) == 1.0 or depth > 900


def test_of_several_references_the_nearest_counts_and_one_that_is_no_json_is_one_field() -> None:
    assert score_of("json_f1", '{"a": 1}', ['{"a": 2}', '{"a": 1}', "no"]) == 1.0
    assert score_of("json_f1", "None.", ['{"a": 2}', "none"]) == 1.0
    assert score_of("json_f1", "{}", []) == 0.0


def test_the_json_metrics_apply_where_every_reference_is_json_and_the_others_everywhere() -> None:
    for name, metric in METRICS.items():
        assert metric.applies_to(["[1]", '{"a": 1}'])
        assert metric.applies_to(["[1]", "none"]) == (name in TEXT)
        assert metric.applies_to([]) == (name in TEXT)
