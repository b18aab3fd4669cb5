"""Select the held-out records that are scored: a core that is the same for all champions, then others for each."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.contract import Attempt
from pipeline.decide.policy import CORE_OF_DROP, CORE_SHARE
from pipeline.models.manifest import trained_ids
from pipeline.models.template import fold
from pipeline.models.tokenizer_files import Window
from pipeline.prepare.decontaminate import HeldOut, Splits, find_groups
from pipeline.prepare.split import DropRow, Prompt


class Scored(NamedTuple):
    """A held-out prompt that is scored."""

    prompt: Prompt
    near: list[str]
    """Ids of its near-duplicates in any split."""
    drop: int
    """The first of its drops that the champion knows; the first of all if it knows none."""


class Selection(NamedTuple):
    """The held-out prompts that are scored, and why some others are not."""

    scored: Sequence[Scored]
    """In the order of their hash."""
    groups: Sequence[str]
    """The name of each one's group."""
    seen: int
    """Prompts that are not scored only because the champion was trained on them or on near-duplicates."""
    too_long: int
    """Rows of prompts that are not scored only because they exceed the window with their answers."""
    longest_answer: int
    """Tokens of the longest answer, with its end token; 0 without any."""

    @property
    def rows(self) -> list[DropRow]:
        """The first row of each scored prompt."""
        return [scored.prompt.rows[0] for scored in self.scored]


def select(attempt: Attempt, splits: Splits, window: Window) -> Selection:
    """
    Select the held-out prompts that are scored, `split.scored_records` at most, and find their groups.

    They are the first in `_scoring_order` that are no near-duplicates of other held-out prompts, that the champion was
    not trained on, nor on a near-duplicate of them, and that fit into the window with their longest answer.
    """
    heldout, champion, split = splits.heldout, attempt.spec.champion, attempt.config.split
    among = {prompt.rows[0].id for prompt in heldout.prompts}.union(*heldout.near.values())
    trained = trained_ids(attempt.path(champion.path), among)
    scored: list[Scored] = []
    seen = too_long = longest = 0
    for number in _scoring_order(heldout, champion.generation, split.scored_records):
        if number not in heldout.near or len(scored) >= split.scored_records:
            continue
        prompt = heldout.prompts[number]
        name = prompt.rows[0].id
        if not trained.isdisjoint([name, *heldout.near[number]]):
            seen += 1
        elif not (answer := _answer_tokens(prompt, window)):
            too_long += len(prompt.rows)
        else:
            # A restored drop may precede drops with the same answers that the champion was trained on.
            drop = next((drop for drop in prompt.drops if drop in (champion.drops or ())), prompt.drops[0])
            scored.append(Scored(prompt, sorted(heldout.near[number] - {name}), drop))
            longest = max(longest, answer)
    scored.sort(key=lambda record: record.prompt.rows[0].hash)
    groups = find_groups([record.prompt for record in scored], heldout.common, split.similarity)
    return Selection(scored, groups, seen, too_long, longest)


def _answer_tokens(prompt: Prompt, window: Window) -> int:
    """Return the tokens of a prompt's longest answer, with its end token; 0 if prompt and answer exceed the window."""
    first = prompt.rows[0]
    answer = max(window.count(row.output) for row in prompt.rows) + 1
    asked = "\n".join((*(text for _, text in first.turns), fold(first.instruction, first.input)))
    fits = not window.counts or window.count(asked) + answer <= window.tokens
    return answer if fits else 0


def _scoring_order(heldout: HeldOut, generation: int, most: int) -> list[int]:
    """
    Return the indices of all held-out prompts in the order in which they are scored; `most` of them are.

    One record per unit comes before the second of any, as records of one unit count as one. The core comes first, since
    the anchor guard compares former champions on the records that they answered: of 1,000 scored records a former
    champion shares 444 with a pool of 7,500 and 390 with one of 15,000, and of each of ten drops at least 34 (240 and
    117, 24 and 12 without a core). The others change with each champion, as its luck remains on the records on which it
    has won: a gain of 3 points after a win of 3 points is promoted in 33 % on other records, in 26 % with this core, in
    13 % on the same records (1,000 trials each, exact match).
    """
    core = _core(heldout, most)

    def salted(number: int) -> tuple[bool, bytes]:
        salted = f"{generation} {heldout.prompts[number].rows[0].hash}"
        return number not in core, hashlib.sha256(salted.encode()).digest()

    earlier: Counter[str] = Counter()
    ranks: dict[int, int] = {}
    for number in sorted(range(len(heldout.prompts)), key=salted):
        unit = heldout.prompts[number].unit
        ranks[number] = earlier[unit]
        earlier[unit] += number in heldout.near
    return sorted(ranks, key=ranks.__getitem__)


def _core(heldout: HeldOut, most: int) -> set[int]:
    """
    Return the indices of the core: of each drop the first selected prompts by hash, one per unit.

    Each drop has the same number at most: 40, or less, perhaps 0, so that the core is at most a third of `most`.
    """
    prompts = [(number, heldout.prompts[number]) for number in heldout.near]
    of_drop = min(CORE_OF_DROP, int(CORE_SHARE * most) // max(1, len({prompt.drops[0] for _, prompt in prompts})))
    taken: Counter[int] = Counter()
    core: dict[str, int] = {}
    for number, prompt in prompts:
        if taken[prompt.drops[0]] < of_drop and core.setdefault(prompt.unit, number) == number:
            taken[prompt.drops[0]] += 1
    return set(core.values())


def heldout_line(scored: Scored, group: str) -> dict[str, Any]:
    """Return a scored prompt's line of heldout.jsonl, whose fields are those that `prepare` lists."""
    first, rows = scored.prompt.rows[0], scored.prompt.rows
    tags = sorted({tag for row in rows for tag in row.tags})
    more = {"pinned": first.pinned, "tags": tags, "near": scored.near, "group": group}
    return row_line(first, references=[row.output for row in rows], drop=scored.drop, **more)


def row_line(row: DropRow, **more: Any) -> dict[str, Any]:
    """Return the fields of a row's JSON line: id, turns if it has any, the three texts, and `more`."""
    earlier = {"turns": row.turns} if row.turns else {}
    texts = {"instruction": row.instruction, "input": row.input, "output": row.output}
    return {"id": row.id, **earlier, **texts, **more}
