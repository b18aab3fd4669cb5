"""Count the rows that later drops replace, and say whether new drops change what the model is judged by."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from pipeline.artifacts import AnswerPair, HeldoutReplaced, Replacement
from pipeline.decide.policy import MOST_REPLACED
from pipeline.prepare.sample import Scored
from pipeline.prepare.split import Prompt

_MOST_EXAMPLES = 10


def replacements(prompts: Iterable[Prompt]) -> tuple[Replacement, ...]:
    """Return the numbers of replaced rows by their drop and the drop that replaces them."""
    counts = Counter(
        (row.drop, prompt.drops[0], prompt.split == "heldout") for prompt in prompts for row in prompt.replaced
    )
    return tuple(
        Replacement(old=old, new=new, rows=counts[old, new, False] + held_out, heldout_rows=held_out)
        for old, new in sorted({(old, new) for old, new, _ in counts})
        for held_out in [counts[old, new, True]]
    )


def replaced_heldout(
    scored: Sequence[Scored], known: Collection[int]
) -> tuple[HeldoutReplaced | None, tuple[AnswerPair, ...]]:
    """
    Return which new drops replace more than a tenth of the scored answers of the drops in `known`, and examples.

    `known` are the drops that the champion was trained on. `None` and no examples if at most a tenth is replaced.
    """
    moved = []
    for record in scored:
        old = next((row for row in record.prompt.replaced if row.drop in known), None)
        if old is not None and record.drop not in known:
            moved.append((old, record))
    older = len(moved) + sum(record.drop in known for record in scored)
    if len(moved) <= MOST_REPLACED * older:
        return None, ()
    new = tuple(drop for drop, _ in Counter(record.drop for _, record in moved).most_common())
    return HeldoutReplaced(drops=new, answers=len(moved), older=older), tuple(
        AnswerPair(
            old_drop=old.drop,
            old_prompt=old.input or old.instruction,
            old_answer=old.output,
            new_drop=record.drop,
            new_answer=record.prompt.rows[0].output,
        )
        for old, record in moved[:_MOST_EXAMPLES]
    )
