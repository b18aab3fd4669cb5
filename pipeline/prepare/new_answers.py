"""Count the rows whose answers are not used, as another drop has another answer, and show some side by side."""

from collections import Counter
from collections.abc import Iterable

from pipeline.artifacts import AnswerPair, Replacement
from pipeline.models.template import shown_prompt
from pipeline.prepare.split import Prompt

#: Pairs that are shown for one drop, and drops with pairs, the latest first.
_MOST_PAIRS, _MOST_DROPS = 20, 10


def counts_by_drops(prompts: Iterable[Prompt]) -> tuple[tuple[Replacement, ...], tuple[Replacement, ...]]:
    """Return the numbers of replaced rows and of rows with proposed answers, each by the older and the newer drop."""
    replaced, proposed = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for prompt in prompts:
        if prompt.counts is not None:
            replaced.update((row.drop, prompt.counts.drop) for row in prompt.replaced)
            proposed.update((prompt.counts.drop, row.drop) for row in prompt.proposed)
    return _listed(replaced), _listed(proposed)


def _listed(pairs: Counter[tuple[int, int]]) -> tuple[Replacement, ...]:
    return tuple(Replacement(old=old, new=new, rows=rows) for (old, new), rows in sorted(pairs.items()))


def proposed_answers(prompts: Iterable[Prompt]) -> tuple[AnswerPair, ...]:
    """Return up to 20 proposed answers of each of the 10 latest drops that have some, beside those that count."""
    pairs: dict[int, list[AnswerPair]] = {}
    for old, row in ((prompt.counts, row) for prompt in prompts for row in prompt.proposed):
        of_drop = pairs.setdefault(row.drop, [])
        if old is not None and len(of_drop) < _MOST_PAIRS:
            texts = {
                "old_prompt": shown_prompt(old.instruction, old.input, old.turns),
                "old_answer": old.output,
                "new_answer": row.output,
            }
            of_drop.append(AnswerPair(old_drop=old.drop, new_drop=row.drop, **texts))
    return tuple(pair for drop in sorted(pairs, reverse=True)[:_MOST_DROPS] for pair in pairs[drop])
