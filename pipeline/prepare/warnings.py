"""Write warnings about a data set that a person should know before trusting its verdict, each with a remedy."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipeline.artifacts import Drop, ModelRef
from pipeline.contract import StepSpec
from pipeline.metrics import json_fields
from pipeline.prepare.decontaminate import Rule
from pipeline.prepare.split import Totals
from pipeline.words import count

#: A warning is given if more than this share of a split is left out.
LARGE_SHARE = 0.2
_WORDS: dict[Rule, str] = {
    "answer": "the same long answer",
    "ngram": "a run of 13 words in common",
    "minhash": "mostly the same words",
}


def data_warnings(
    spec: StepSpec, totals: Totals, removed: Mapping[Rule, int], groups: int, metric: str
) -> tuple[str, ...]:
    """Return all warnings; `removed` is the number of near-duplicate training rows by the rule that found them."""
    return (
        *_pinned(spec.drops, spec.config.gate.on),
        *_near_duplicates(totals, removed, spec.config.split.similarity),
        *_groups(len(totals.scored), groups),
        *contamination_warnings(totals, spec.drops),
        *_seen(totals, spec.drops),
        *_references(totals, metric, spec.drops, spec.champion),
    )


def _pinned(drops: Sequence[Drop], on: str) -> Iterator[str]:
    pinned = [drop for drop in drops if drop.role == "heldout"]
    if on != "pinned" and pinned:
        names = " and ".join(f"{drop.rows:,} of {drop.name} (drop {drop.id})" for drop in pinned)
        yield (
            "pinned records only stay out of training, and nothing is judged on them, since gate.on is "
            f'"{on}": {names}; to judge on them and nothing else, set gate.on = "pinned"'
        )


def _near_duplicates(totals: Totals, removed: Mapping[Rule, int], similarity: float) -> Iterator[str]:
    train = totals.train_rows + totals.dev_rows + totals.near_duplicates
    if totals.near_duplicates > LARGE_SHARE * train:
        reasons = ", ".join(f"{removed[rule]:,} with {words}" for rule, words in _WORDS.items() if removed[rule])
        similar = f", or, if the task's rows are similar by nature, raise split.similarity ({similarity:g})"
        yield (
            f"{totals.near_duplicates:,} of {train:,} training rows ({totals.near_duplicates / train:.0%}) are left "
            f"out as near-duplicates of a held-out record ({reasons}): drop rows that say new things"
            f"{similar if mostly_similar(removed) else ''}"
        )
    if totals.heldout_duplicates > LARGE_SHARE * totals.heldout_prompts:
        yield (
            f"{totals.heldout_duplicates:,} of {totals.heldout_prompts:,} held-out records are not scored because they "
            "repeat another one almost word for word: they would count one case several times; hold out other cases"
        )


def mostly_similar(removed: Mapping[Rule, int]) -> bool:
    """Return whether most near-duplicates were found by `split.similarity`, so that raising it would keep them."""
    return 2 * removed["minhash"] > sum(removed.values())


def _groups(records: int, groups: int) -> Iterator[str]:
    if records - groups > LARGE_SHARE * records:
        yield (
            f"{records:,} held-out records count as {groups:,}, since some ask the same in other words or have the "
            "same long answer: hold out other cases"
        )


def contamination_warnings(totals: Totals, drops: Sequence[Drop]) -> list[str]:
    """Return a warning for each drop of which more than 20 % of the rows have a pinned held-out prompt."""
    return [
        f"{drop.name}: {totals.removed_heldout[drop.id]:,} of {drop.rows:,} rows are held-out questions and not "
        f"trained on: if the file should not be there, dropforge drops withdraw {drop.id} --reason TEXT"
        for drop in drops
        if totals.removed_heldout[drop.id] > LARGE_SHARE * drop.rows
    ]


def _seen(totals: Totals, drops: Sequence[Drop]) -> Iterator[str]:
    names = {drop.id: f"{drop.name} (drop {drop.id})" for drop in drops}
    trained = totals.trained_before.total()
    if trained:
        where = " and ".join(
            f"{number:,} of {names.get(drop, 'drops that are not used any more')}"
            for drop, number in sorted(totals.trained_before.items(), key=lambda item: (item[0] == 0, item[0]))
        )
        yield f"{_not_scored(trained)} ({where}): hold out records that are in no training drop"
    if near := totals.seen_by_champion - trained:
        yield f"{_not_scored(near, 'near-duplicates of ')}: hold out records that say other things"


def _not_scored(records: int, copies_of: str = "") -> str:
    why = f"not scored because the champion was trained on {copies_of}"
    return count(records, f"held-out record is {why}it", f"held-out records are {why}them")


def _references(totals: Totals, metric: str, drops: Sequence[Drop], champion: ModelRef) -> Iterator[str]:
    """Yield warnings about references that changed since `champion` was judged, or that `metric` cannot parse."""
    names = {drop.id: drop.name for drop in drops}
    changed = Counter(one.drop for one in totals.scored if one.prompt.changed and one.prompt.rows[0].pinned)
    for drop, number in sorted(changed.items()):
        if drop not in (champion.drops or ()):
            yield (
                f"{count(number, 'pinned reference was', 'pinned references were')} replaced by {names[drop]} (drop "
                f"{drop}), which gives other answers than an earlier pinned drop: if that is a mistake, dropforge "
                f"drops withdraw {drop} --reason TEXT"
            )
    references = [row for one in totals.scored for row in one.prompt.rows] if metric == "json_f1" else []
    if bad := [(row.drop, row.number) for row in references if json_fields.parse(row.output) is None]:
        by_drop = sorted(Counter(drop for drop, _ in bad).items())
        where = ", ".join(f"{some:,} of drop {drop} ({names[drop]})" for drop, some in by_drop)
        drop, number = min(bad)
        yield (
            f"{len(bad):,} of {len(references):,} held-out references are no JSON object or array, and an answer to "
            f"them scores 0 by field F1 unless it is the same text: {where}, the first is record {number + 1} of drop "
            f"{drop}; if they should be, correct these rows and drop the file again, withdraw the drop, or set "
            "evaluate.metric"
        )
