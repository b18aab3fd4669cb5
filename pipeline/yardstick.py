"""What a track's previous verdict was judged on, where a run is judged on something else; and the words that say it."""

from pipeline.artifacts import Frozen
from pipeline.wording import plain


class YardstickBefore(Frozen):
    """The held-out set of the track's previous verdict, which is not what this run is judged on."""

    run: int
    """Whose verdict it was."""
    records: int | None
    """That were scored; `None` if its verdict is gone."""
    champion_score: float | None
    """Of today's champion on them, in points; `None` if it was not judged on them, or by another metric."""
    added: tuple[str, ...] = ()
    """What this run is judged on and that one was not: each drop with its number, file and by whose word."""
    removed: tuple[str, ...] = ()
    """What that one was judged on and this one is not."""


def yardstick_words(before: YardstickBefore, records: int, champion_score: float | None) -> str:
    """Say what changed, by whose word, and what the champion scores on the new set, which has so many `records`."""
    said = [f"The yardstick changed since run {before.run}."]
    said += [f"Added: {', '.join(before.added)}."] if before.added else []
    said += [f"Taken out: {', '.join(before.removed)}."] if before.removed else []
    was = "" if before.records is None else f"{before.records:,} before, "
    said.append(f"Records: {was}{records:,} now.")
    old = "was not judged on the old one"
    if before.champion_score is not None:
        old = f"scored {plain(before.champion_score)} points on the old one"
    new = "" if champion_score is None else f" and scores {plain(champion_score)} on this one"
    return f"{' '.join(said)} The champion {old}{new}."
