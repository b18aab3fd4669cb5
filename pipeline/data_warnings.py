"""What a person should know about a data set before believing what comes of it: a sentence each, with what to do."""

from pipeline.overlaps import RULES, Overlaps
from pipeline.sides import Totals

#: From this share of a side on, what is left out is worth a word.
LARGE_SHARE = 0.2
_WORDS = {
    "answer": "the same long answer", "ngram": "a run of 13 words in common", "minhash": "mostly the same words",
}  # fmt: skip


def data_warnings(totals: Totals, overlaps: Overlaps, similarity: float) -> tuple[str, ...]:
    """Return the warnings of a split; `similarity` is `split.similarity`."""
    found = []
    train = totals.train_rows + totals.dev_rows + totals.near_duplicates
    if totals.near_duplicates > LARGE_SHARE * train:
        reasons = ", ".join(
            f"{count:,} with {_WORDS[rule]}" for rule, count in zip(RULES, overlaps.counts(), strict=True) if count
        )
        found.append(
            f"{totals.near_duplicates:,} of {train:,} training rows ({totals.near_duplicates / train:.0%}) are left "
            f"out because they are too near to a held-out record ({reasons}): drop rows that say new things, or, if "
            f"rows that are alike are what the task is like, raise split.similarity ({similarity:g})"
        )
    if totals.heldout_duplicates > LARGE_SHARE * totals.heldout_prompts:
        found.append(
            f"{totals.heldout_duplicates:,} of {totals.heldout_prompts:,} held-out records are not scored because they "
            "repeat another one almost word for word: they would count one case several times; hold out other cases"
        )
    if totals.seen_by_champion:
        found.append(
            f"{totals.seen_by_champion:,} held-out records are not scored because the champion was trained on them or "
            "on near copies: pin records that were never in a drop"
        )
    return tuple(found)
