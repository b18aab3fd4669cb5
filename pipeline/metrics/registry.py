"""
Metrics: how near an answer comes to its references, 0 (nothing) to 1 (the same), in any script.

With several references the nearest one counts. Adding a metric is one entry in METRICS.
"""

import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

from pipeline.metrics import json_fields

#: Scripts that put no spaces between words; there each character is a token.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # CJK radicals
    (0x3005, 0x3007),
    (0x3021, 0x30FF),  # Hiragana, Katakana
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),  # Han, supplementary planes
)
_CHARACTERS_A_WORD = 2
#: Codes that are looked through at a time: a long piece is read to its end only where nothing is found in it.
_WINDOW = 256
_UNSPACED_SIGN = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED) + "]")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_SPACE = re.compile(r"\s+")
# Signs that carry meaning at an edge (minus, percent, #, currency, @) are not here.
_QUOTES = "\"'`*_ \u2018\u2019\u201a\u201c\u201d\u201e"
_OPENING = _QUOTES + "([{<\u00a1\u00ab\u00bf\u2039\u3008\u300a\u300c\u300e\u3010"
_CLOSING = _QUOTES + ")]}>.,;:!?\u00bb\u060c\u061f\u06d4\u0964\u203a\u3001\u3002\u3009\u300b\u300d\u300f\u3011"

Compute = Callable[[str, Sequence[str]], float]
ComputeAll = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]


@dataclass(frozen=True)
class Metric:
    """One way to score an answer."""

    name: str
    title: str
    """How it is called in a sentence."""
    compute: Compute
    """Score of one answer, 0 to 1, against its references."""
    compute_all: ComputeAll | None = None
    """The same for many answers at once, where that is faster."""
    higher_is_better: bool = True
    continuous: bool = True
    """Whether there is anything between 0 and 1: it decides the paired test."""
    applies: Callable[[Sequence[str]], bool] | None = None
    """Whether it says anything about a record with these references; none: about every record."""

    def says_something(self, references: Sequence[str]) -> bool:
        """Return whether it says anything about a record with these references."""
        return self.applies is None or self.applies(references)

    def scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return the score of each prediction against the references at the same place."""
        if self.compute_all is not None:
            return self.compute_all(predictions, references)
        return [self.compute(*pair) for pair in zip(predictions, references, strict=True)]


def normalise(text: str) -> str:
    """
    Return `text` as exact match compares it: NFKC, without case, single spaces, no punctuation around it.

    Quotes, brackets, emphasis and the marks that end a sentence go; a sign that belongs to a value (-5, 50%, .5, C#)
    stays. Text of nothing but punctuation is kept.
    """
    plain = _SPACE.sub(" ", _fold(text)).strip()
    bare = plain.lstrip(_OPENING).rstrip(_CLOSING)
    return bare or plain


def tokens(text: str) -> list[str]:
    """
    Return the words of `text` without case: letters and digits with the marks that belong to them.

    A script without spaces between words gives a token a character; emoji are tokens too. For ASCII text these are the
    tokens that rouge_score makes itself.
    """
    folded = _fold(text)
    if folded.isascii():
        return _ASCII_WORD.findall(folded)
    found: list[str] = []
    extends, takes_marks = False, False
    for character in folded:
        kind = unicodedata.category(character)
        if kind == "Cf":  # joiners and other invisible signs, within words too
            continue
        if kind[0] == "M":
            if takes_marks:
                found[-1] += character
            continue
        spaced = kind[0] in "LN" and not _is_unspaced(character)
        takes_marks = kind[0] in "LN" or kind == "So"
        if spaced and extends:
            found[-1] += character
        elif takes_marks:
            found.append(character)
        extends = spaced
    return found


def is_short(text: str, most: int) -> bool:
    """
    Return whether `text` has at most so many words, looking no further than it must.

    A word is what stands between blanks, a code or an address too. In a script without spaces two characters count as
    one: a word has about so many in Chinese, and a few more in Japanese and Thai.
    """
    pieces = text.split(None, most)
    if len(pieces) > most or text.isascii():
        return len(pieces) <= most
    enough = _CHARACTERS_A_WORD * (most + 1)
    counts = [_unspaced(piece, enough) for piece in pieces]
    return counts.count(0) + sum(counts) // _CHARACTERS_A_WORD <= most


def _unspaced(text: str, enough: int) -> int:
    """Return how many of the tokens are single characters of a script without spaces; stop at `enough`."""
    # A mark that is parted from its character is not counted, so it does not matter where a window ends.
    windows = (unicodedata.normalize("NFKC", text[at : at + _WINDOW]) for at in range(0, len(text), _WINDOW))
    found = (sign[0] for window in windows for sign in _UNSPACED_SIGN.finditer(window))
    characters = (sign for sign in found if unicodedata.category(sign)[0] in "LN")
    return sum(1 for _ in islice(characters, enough))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the normalised prediction is one of the normalised references, else 0."""
    return float(normalise(prediction) in {normalise(reference) for reference in references})


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over the bag of tokens (Rajpurkar et al. 2016, SQuAD)."""
    return max((_f1(prediction, reference) for reference in references), default=0.0)


def rouge_all(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """
    Return the ROUGE F-measure of each prediction (Lin 2004): rouge_score with our tokens, through `evaluate.Metric`.

    `kind` is rouge1, rouge2 or rougeL. A reference without any token (a dash, say) is compared exactly.
    """
    if not predictions:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        metric = _rouge_class()(config_name=kind, keep_in_memory=True, cache_dir=scratch)
        result = metric.compute(predictions=list(predictions), references=[list(some) for some in references])
    return [
        max(score, exact_match(prediction, [text for text in some if not tokens(text)]))
        for score, prediction, some in zip(result[kind], predictions, references, strict=True)
    ]


def chrf(prediction: str, references: Sequence[str]) -> float:
    """
    Return chrF2, the F2 of character n-grams up to 6 without blanks (Popovi\u0107 2015), through sacrebleu's defaults.

    Of several references the nearest counts, as sacrebleu does it.
    """
    return float(_chrf().sentence_score(prediction, list(references)).score) / 100 if references else 0.0


def json_valid(prediction: str, _references: Sequence[str]) -> float:
    """Return 1 if the prediction is a JSON object or array and nothing else, else 0."""
    return float(json_fields.parse(prediction) is not None)


def json_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the F1 of the prediction's fields (`json_answers.field_f1`); a reference that is no JSON is one field."""
    return max(
        (
            exact_match(prediction, [reference])
            if json_fields.parse(reference) is None
            else json_fields.field_f1(prediction, reference)
            for reference in references
        ),
        default=0.0,
    )


def _all_json(references: Sequence[str]) -> bool:
    return bool(references) and all(json_fields.parse(text) is not None for text in references)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _rouge(kind: str, prediction: str, references: Sequence[str]) -> float:
    return rouge_all(kind, [prediction], [references])[0]


def _f1(prediction: str, reference: str) -> float:
    said, wanted = Counter(tokens(prediction)), Counter(tokens(reference))
    if not wanted:
        return exact_match(prediction, [reference])
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total())


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _is_unspaced(character: str) -> bool:
    point = ord(character)
    return any(first <= point <= last for first, last in _UNSPACED)


class _Tokenizer:
    """Our tokens, in the form that rouge_score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


@cache
def _rouge_class() -> Any:
    """Define the metric on first use: `evaluate.load` would ask a hub for it, and importing the stack takes seconds."""
    import datasets
    import evaluate
    from rouge_score import rouge_scorer

    class UnicodeRouge(evaluate.Metric):  # type: ignore[misc]
        """ROUGE F-measures, one a record, the best over a record's references."""

        def _info(self) -> Any:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="ROUGE with Unicode tokens",
                citation="Lin 2004",
                features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
            )

        def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
            kind = self.config_name
            scorer = rouge_scorer.RougeScorer([kind], tokenizer=_Tokenizer())
            pairs = zip(predictions, references, strict=True)
            return {kind: [float(scorer.score_multi(some, answer)[kind].fmeasure) for answer, some in pairs]}

    return UnicodeRouge


def _rouge_metric(name: str, title: str) -> Metric:
    return Metric(name, title, compute=partial(_rouge, name), compute_all=partial(rouge_all, name))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "exact match", compute=exact_match, continuous=False),
        Metric("token_f1", "token F1", compute=token_f1),
        _rouge_metric("rouge1", "ROUGE-1"),
        _rouge_metric("rouge2", "ROUGE-2"),
        _rouge_metric("rougeL", "ROUGE-L"),
        Metric("chrf", "chrF", compute=chrf),
        Metric("json_valid", "valid JSON", compute=json_valid, continuous=False, applies=_all_json),
        Metric("json_f1", "field F1", compute=json_f1, applies=_all_json),
    )
}
