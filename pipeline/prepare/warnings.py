"""What a person should know about a data set before believing what comes of it: a sentence each, with what to do."""

from collections.abc import Mapping, Sequence

from pipeline.artifacts import Drop, ModelRef
from pipeline.prepare.decontaminate import Rule
from pipeline.prepare.split import Totals
from pipeline.words import count

#: From this share of a split on, what is left out is worth a word.
LARGE_SHARE = 0.2
_WORDS: dict[Rule, str] = {
    "answer": "the same long answer",
    "ngram": "a run of 13 words in common",
    "minhash": "mostly the same words",
}


def data_warnings(totals: Totals, removed: Mapping[Rule, int], similarity: float) -> tuple[str, ...]:
    """Return the warnings of a split; `removed` are near-duplicates by rule, `similarity` is `split.similarity`."""
    found = []
    train = totals.train_rows + totals.dev_rows + totals.near_duplicates
    if totals.near_duplicates > LARGE_SHARE * train:
        reasons = ", ".join(f"{removed[rule]:,} with {words}" for rule, words in _WORDS.items() if removed[rule])
        found.append(
            f"{totals.near_duplicates:,} of {train:,} training rows ({totals.near_duplicates / train:.0%}) are left "
            f"out because they are too near to a held-out record ({reasons}): drop rows that say new things"
        )
        if mostly_alike(removed):
            wanted = f"raise split.similarity ({similarity:g})"
            found[-1] += f", or, if rows that are alike are what the task is like, {wanted}"
    if totals.heldout_duplicates > LARGE_SHARE * totals.heldout_prompts:
        found.append(
            f"{totals.heldout_duplicates:,} of {totals.heldout_prompts:,} held-out records are not scored because they "
            "repeat another one almost word for word: they would count one case several times; hold out other cases"
        )
    return tuple(found)


def mostly_alike(removed: Mapping[Rule, int]) -> bool:
    """Return whether most near-duplicates are removed by `split.similarity`, so that raising it would keep them."""
    return 2 * removed["minhash"] > sum(removed.values())


def contamination_warnings(totals: Totals, drops: Sequence[Drop]) -> tuple[str, ...]:
    """Return a warning for each drop many of whose rows are held-out questions, pinned in its track."""
    many = (drop for drop in drops if totals.removed_heldout[drop.id] > LARGE_SHARE * drop.rows)
    return tuple(
        f"{drop.name}: {totals.removed_heldout[drop.id]:,} of {drop.rows:,} rows are held-out questions and not "
        f"trained on: if the file should not be there, dropforge drops withdraw {drop.id} --reason TEXT"
        for drop in many
    )


def seen_warnings(totals: Totals, drops: Sequence[Drop]) -> tuple[str, ...]:
    """Return the warnings that records are not scored because the champion was trained on them, or on near copies."""
    found, names = [], {drop.id: f"{drop.name} (drop {drop.id})" for drop in drops}
    trained = totals.trained_before.total()
    if trained:
        where = " and ".join(
            f"{number:,} of {names.get(drop, 'drops that are not used any more')}"
            for drop, number in sorted(totals.trained_before.items(), key=lambda one: (one[0] == 0, one[0]))
        )
        found.append(f"{_not_scored(trained)} ({where}): hold out records that are in no training drop")
    if near := totals.seen_by_champion - trained:
        found.append(f"{_not_scored(near, 'near copies of ')}: hold out records that say other things")
    return tuple(found)


def _not_scored(records: int, copies_of: str = "") -> str:
    why = f"not scored because the champion was trained on {copies_of}"
    return count(records, f"held-out record is {why}it", f"held-out records are {why}them")


def group_warnings(records: int, groups: int) -> tuple[str, ...]:
    """Return the warning that many of the scored held-out records ask the same in other words."""
    if records - groups <= LARGE_SHARE * records:
        return ()
    said = f"{records:,} held-out records count as {groups:,}, since some ask the same in other words"
    return (f"{said} or have the same long answer: hold out other cases",)


def pinned_warnings(drops: Sequence[Drop], on: str) -> tuple[str, ...]:
    """Return the warning that pinned records are not judged on, if there are some and `gate.on`, `on`, says so."""
    pinned = [drop for drop in drops if drop.role == "heldout"]
    if on == "pinned" or not pinned:
        return ()
    names = " and ".join(f"{drop.rows:,} of {drop.name} (drop {drop.id})" for drop in pinned)
    said = f'pinned records only stay out of training, and nothing is judged on them, since gate.on is "{on}": {names}'
    return (f'{said}; to judge on them and nothing else, set gate.on = "pinned"',)


def reference_warnings(totals: Totals, metric: str, drops: Sequence[Drop], champion: ModelRef) -> tuple[str, ...]:
    """
    Return the warnings of what candidates are measured by: references that changed, or that `metric` cannot read.

    Those that `champion` was judged by itself are settled: one that won by them speaks for them.
    """
    names = {drop.id: drop.name for drop in drops}
    found = [
        f"{count(number, 'pinned reference was', 'pinned references were')} replaced by {names[drop]} (drop "
        f"{drop}), which gives other answers than an earlier pinned drop: if that is a mistake, dropforge drops "
        f"withdraw {drop} --reason TEXT"
        for drop, number in sorted(totals.pins_changed.items())
        if drop not in (champion.drops or ())
    ]
    if metric == "json_f1" and totals.first_not_json is not None:
        drop, number = totals.first_not_json
        where = ", ".join(f"{some:,} of drop {one} ({names[one]})" for one, some in sorted(totals.not_json.items()))
        found.append(
            f"{totals.not_json.total():,} of {totals.heldout_answers:,} held-out references are no JSON object "
            f"or array, and an answer to them scores 0 by field F1 unless it is the same text: {where}, the first is "
            f"record {number + 1} of drop {drop}; if they should be, mend these rows and drop "
            "the file again, withdraw the drop, or set evaluate.metric"
        )
    return tuple(found)
