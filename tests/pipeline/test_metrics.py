import string

import numpy as np
import pytest
from rouge_score import rouge_scorer

from pipeline import metrics
from pipeline.metrics import METRICS

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
CONTINUOUS = [name for name, metric in METRICS.items() if metric.continuous]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", METRICS)
def test_an_identical_answer_scores_one_in_every_script(name: str, script: str) -> None:
    assert METRICS[name].compute(SCRIPTS[script], [SCRIPTS[script]]) == 1.0


@pytest.mark.parametrize("script", ["Thai", "Russian", "Chinese", "Hindi"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_half_an_answer_scores_between_nothing_and_all_in_every_script(name: str, script: str) -> None:
    text = SCRIPTS[script]
    score = METRICS[name].compute(text[: len(text) // 2], [text])
    assert 0.0 < score < 1.0


@pytest.mark.parametrize("name", METRICS)
def test_another_answer_and_no_answer_score_zero(name: str) -> None:
    assert METRICS[name].compute("entirely different", ["a quick brown fox"]) == 0.0
    assert METRICS[name].compute("", ["a quick brown fox"]) == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_the_nearest_of_several_references_counts(name: str) -> None:
    score = METRICS[name].compute("quick brown fox", ["something else", "Quick brown fox", "nothing at all"])
    assert score == 1.0


@pytest.mark.parametrize("name", METRICS)
def test_scoring_together_is_scoring_one_by_one(name: str) -> None:
    answers = ["a b c", "", "x y", "Ответ", "-"]
    references = [["a b d", "a"], ["a"], ["x y"], ["ответ да"], ["-"]]
    metric = METRICS[name]
    together = metric.scores(answers, references)
    assert together == [metric.compute(answer, some) for answer, some in zip(answers, references, strict=True)]
    assert together[-1] == 1.0
    assert metric.scores([], []) == []


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
        assert metrics.tokens(text) == metrics.tokens(text + " \u00a1")


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    # Precision 2/3, recall 2/4.
    assert METRICS["token_f1"].compute("a b x", ["a b c d"]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert METRICS["token_f1"].compute("a a a", ["a"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("  Billing.\n", "billing"),
        ("**Billing**", "billing"),
        ("\u201cYes!\u201d", "yes"),
        ("\uff22\uff49\uff4c\uff4c", "Bill"),
        ("STRASSE", "stra\u00dfe"),
        ("two  \t words", "two words"),
        ("(a)", "a"),
        ("是的。", "是的"),
        ("caf\u0065\u0301", "caf\u00e9"),
    ],
)
def test_exact_match_sees_through_case_space_form_and_surrounding_punctuation(said: str, wanted: str) -> None:
    assert METRICS["exact_match"].compute(said, [wanted]) == 1.0


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("-5", "5"),
        ("50%", "50"),
        (".5", "5"),
        ("C#", "C"),
        ("$5", "5"),
        ("co-op", "coop"),
        ("billing now", "billing"),
        ("?", "!"),
    ],
)
def test_exact_match_keeps_what_carries_meaning(said: str, wanted: str) -> None:
    assert METRICS["exact_match"].compute(said, [wanted]) == 0.0


def test_marks_and_invisible_signs_stay_with_their_letter() -> None:
    assert metrics.tokens("हिन्दी शब्द") == ["हिन्दी", "शब्द"]
    assert metrics.tokens("می\u200cخواهم") == ["میخواهم"]
    assert metrics.tokens("東京tower・2塔") == ["東", "京", "tower", "2", "塔"]
    assert metrics.tokens("! \u0301 a") == ["a"]


def test_only_exact_match_is_a_yes_or_no_and_every_metric_has_its_own_name() -> None:
    assert [name for name, metric in METRICS.items() if not metric.continuous] == ["exact_match"]
    assert all(name == metric.name for name, metric in METRICS.items())
    assert all(metric.higher_is_better for metric in METRICS.values())
