"""
Assign rows to training and dev, without near-duplicates of held-out records; find held-out records that repeat another.

Common text is not compared: an instruction, a run of words or a long answer in more than 1 % of the prompts. (More
copies than that of a text cannot be distinguished from the form of a task.) These shares are counted in at most 10,000
prompts, those with the lowest hashes, which are a random sample.

In the order of their hash, held-out records are selected unless they are near-duplicates of one selected before. All
near-duplicates of selected records are left out, and noted with each of these: a model may have been trained on them.
No record can move to another split. Held-out records of one unit (a group, a document) do not repeat each other: they
count as one, and what is a near-duplicate of one is noted with each.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress, islice
from sys import intern
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Overlap
from pipeline.config import DEV_ROWS, RunConfig, Unit
from pipeline.metrics.tokens import shingles, tokens
from pipeline.models.template import shown_prompt
from pipeline.prepare.near_duplicates import LEAST_SHARED, RunIndex, SimilarityIndex, Text, long_runs
from pipeline.prepare.split import SAMPLE, DropRow, Prompt, SplitName, choose_unit, group_prompts

#: Yields the prompts, and reports progress as a phase.
Watch = Callable[[Sequence[Prompt], str], Iterable[Prompt]]
Rule = Literal["unit", "answer", "ngram", "shingles"]
#: Text that more than this share and more than this number of the prompts have in common is not compared.
COMMON_SHARE = 0.01
COMMON_ROWS = 3
#: A long answer to more prompts than this is a label of the task; to fewer it may be one case in other words.
LABEL_ROWS = 10
#: Prompts of one group have at least this share of `split.similarity`, by words. A lower share finds more paraphrases,
#: but also groups more rows of the same subject.
GROUP_SHARE = 0.65
#: Prompts with more than this share of a prompt's common words are of the same form.
SAME_FORM = 0.6
#: A word in this share of the prompts of one form belongs to it. Paraphrases of one question vary all words.
FORM_WORD = 0.95
#: Answers with fewer words are not compared.
LONG_ANSWER_WORDS = 8
MOST_EXAMPLES = 10


@dataclass(frozen=True)
class Common:
    """Hashes of texts that too many prompts have in common, which are not compared, and the common words."""

    instructions: frozenset[int]
    answers: frozenset[int]
    labels: frozenset[int]
    """Those of `answers` that are labels of the task."""
    greetings: frozenset[str] = frozenset()
    """First exchanges (`DropRow.begun`) after which more than three conversations go on in different ways."""
    pairs: bool = False
    """Whether a shorter answer is compared with its question: the same two may come after other turns."""
    runs: frozenset[int] = frozenset()
    """Of 3 and of 13 words."""
    having: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Common word -> whether each prompt has it."""

    def words(self, row: DropRow) -> Sequence[str]:
        """Return a prompt's case-folded words to compare: those of the questions before it, and its `own_words`."""
        return [word for role, text in row.turns if role == "user" for word in tokens(text)] + self.own_words(row)

    def own_words(self, row: DropRow) -> list[str]:
        """Return the words of a prompt's last question: all, or only the input's if the instruction is common."""
        before, after = tokens(row.instruction), tokens(row.input)
        return after if hash(tuple(before)) in self.instructions else [*before, *after]

    def text(self, prompt: Prompt) -> Text:
        """Return the `words` of a prompt with rows, and the hashes of their 3-word runs: all, and the compared ones."""
        words = self.words(prompt.rows[0])
        every = shingles(words)
        return Text(words, every, every if self.runs.isdisjoint(every) else every - self.runs)

    def long_answers(self, prompt: Prompt) -> set[int]:
        """Return the hashes of a prompt's answers that are long enough to compare, common ones included."""
        return {_long_answer(row, self.pairs) for row in prompt.rows} - {0}

    def group_text(self, prompt: Prompt) -> Text:
        """
        Return a prompt's words, as hashes in place of shingles, that are compared for groups; `Text.words` is empty.

        A common word is left out unless most prompts with it are of this prompt's form, and less than 95 % of this form
        have it. A prompt is of the form if it has more than 60 % of this prompt's common words.
        """
        words = set(self.words(prompt.rows[0]))
        if common := sorted(words & self.having.keys()):
            have = np.array([self.having[word] for word in common])
            same = have.sum(0) > SAME_FORM * len(common)
            counts = have[:, same].sum(1)
            family = (counts > have.sum(1) / 2) & (counts < FORM_WORD * same.sum())
            words -= set(compress(common, ~family))
        hashes = set(map(hash, words))
        return Text((), hashes, hashes)


def find_common(prompts: Sequence[Prompt]) -> Common:
    """
    Return what more than 1 %, and more than three, of `prompts` have in common: instructions, answers, runs, words.

    Of answers, those of at least eight words count (`_long_answer`); those of more than ten prompts, too, are `labels`.
    First exchanges with more than three ways to go on are `greetings`. All `prompts` must have rows.
    """
    most = max(int(COMMON_SHARE * len(prompts)), COMMON_ROWS)
    instructions = array("q", (hash(tuple(tokens(prompt.rows[0].instruction))) for prompt in prompts))
    pairs = any(prompt.rows[0].turns for prompt in prompts)
    answers = array("q", filter(None, (_long_answer(row, pairs) for prompt in prompts for row in prompt.rows)))
    labels = _frequent(answers, max(most, LABEL_ROWS))
    begun = Counter(first for first, _ in {(row.begun, row.group) for prompt in prompts for row in prompt.rows})
    greetings = frozenset(first for first, count in begun.items() if count > COMMON_ROWS)
    common = Common(_frequent(instructions, most), _frequent(answers, most), labels, greetings, pairs)
    runs = array("q")
    words = []
    for prompt in prompts:
        of_prompt = common.own_words(prompt.rows[0])  # a question of a conversation counts once
        runs.extend(shingles(of_prompt) | long_runs(of_prompt))
        words.append(set(map(intern, of_prompt)))
    counts = Counter(chain.from_iterable(words))
    having = {word: np.zeros(len(words), np.bool_) for word, count in counts.items() if count > most}
    for number, some in enumerate(words):
        for word in having.keys() & some:
            having[word][number] = True
    return replace(common, runs=_frequent(runs, most), having=having)


class LeftOut(NamedTuple):
    """Rows of one prompt that are near-duplicates of a held-out prompt."""

    rule: Rule
    rows: Sequence[DropRow]
    heldout: DropRow
    """The first row of the held-out prompt."""

    @property
    def example(self) -> Overlap:
        """Both prompts, or with the rule `answer` both answers, of the first left-out row and the held-out one."""
        train, heldout = (
            row.output if self.rule == "answer" else shown_prompt(row.instruction, row.input, row.turns)
            for row in (self.rows[0], self.heldout)
        )
        return Overlap(rule=self.rule, train_text=train, heldout_text=heldout)


class HeldOut:
    """The held-out prompts, those of them that are selected, and the near-duplicates of these."""

    def __init__(self, prompts: Sequence[Prompt], similarity: float, watch: Watch = lambda prompts, _: prompts) -> None:
        """
        Select each held-out prompt that is no near-duplicate of one selected before, unless both are of one unit.

        `prompts` are those of all splits, in the order of their hash: the first 10,000 tell which texts are common.
        Raises what `watch` raises.
        """
        self.prompts = [prompt for prompt in prompts if prompt.split == "heldout"]
        sample = list(islice((prompt for prompt in prompts if prompt.rows), SAMPLE))
        self.common = find_common(sample)
        self.sampled = len(sample)
        self.largest_unit = max(Counter(prompt.unit for prompt in sample).values(), default=0)
        """Most prompts of one unit among the `sampled` ones, 10,000 at most."""
        self.near: dict[int, set[str]] = {}
        """Index of a selected prompt -> ids of its near-duplicates; one set for all of a unit, their own ids in it."""
        self._similar = SimilarityIndex(similarity)
        self._runs = RunIndex(self.common.runs)
        self._answers: dict[int, int] = {}
        self._units: dict[str, int] = {}
        """Unit -> index of its first selected prompt; of any, if none is selected."""
        for number, prompt in enumerate(watch(self.prompts, "comparing")):
            text = self.common.text(prompt)
            answers = self.common.long_answers(prompt) - self.common.answers
            near = set[int]().union(*self._near(text), map(self._answers.__getitem__, self._answers.keys() & answers))
            if all(self.prompts[other].unit == prompt.unit for other in near):
                first = self._units.setdefault(prompt.unit, number)
                self.near[number] = self.near.setdefault(first, set())
                self._similar.add(number, text)
                self._runs.add(number, text)
                self._answers.update(dict.fromkeys(answers, number))
        for number, prompt in enumerate(self.prompts):
            self._units.setdefault(prompt.unit, number)
        for prompt in self.prompts:
            self.compare(prompt._replace(rows=[*prompt.rows, *prompt.removed]))

    def compare(self, prompt: Prompt) -> list[LeftOut]:
        """
        Return the rows of a prompt that are near-duplicates of held-out prompts; add its id to `near` of selected ones.

        All rows, as one item, if the prompt is of the unit of a held-out one (or was, when its conversation had one
        exchange that is no greeting), else if it shares a 13-word run with a selected prompt, else if it is similar to
        one. Else an item for each row whose answer a selected prompt has (`long_answers`, without common ones). Empty
        if there are none. `prompt` must have rows.
        """
        by_run, similar = self._near(self.common.text(prompt))
        by_answer = [self._answers.get(_long_answer(row, self.common.pairs)) for row in prompt.rows]
        units = {prompt.unit, *({row.begun for row in prompt.rows} - self.common.greetings)}
        by_unit = {self._units[unit] for unit in self._units.keys() & units}
        near = {*by_run, *similar, *by_answer, *by_unit}
        for number in self.near.keys() & near:
            self.near[number].add(prompt.rows[0].id)
        rules: dict[Rule, set[int]] = {"unit": by_unit, "ngram": by_run, "shingles": similar}
        for rule, numbers in rules.items():
            if numbers:
                return [LeftOut(rule, prompt.rows, self.prompts[min(numbers)].rows[0])]
        rows = zip(prompt.rows, by_answer, strict=True)
        return [LeftOut("answer", [row], self.prompts[other].rows[0]) for row, other in rows if other is not None]

    def _near(self, text: Text) -> tuple[set[int], set[int]]:
        return self._runs.find(text), self._similar.find(text)


@dataclass(frozen=True)
class Splits:
    """All prompts, the held-out ones and their near-duplicates, and the rows of training and dev."""

    prompts: Sequence[Prompt]
    heldout: HeldOut
    train: list[DropRow]
    """In the order of the prompts' hash; a row's drop is the first since the prompt's answers changed."""
    dev: list[DropRow]
    left_out: Sequence[LeftOut]
    unit: Unit

    @property
    def near_duplicates(self) -> int:
        """Number of rows of training and dev prompts that are left out as near-duplicates of a held-out record."""
        return sum(len(part.rows) for part in self.left_out)

    @property
    def heldout_duplicates(self) -> int:
        """Number of held-out prompts that are not selected, as near-duplicates of a selected one."""
        return len(self.heldout.prompts) - len(self.heldout.near)

    @property
    def removed(self) -> Counter[int]:
        """Number of training rows that are left out since their prompt is pinned, by drop."""
        return Counter(row.drop for prompt in self.prompts for row in prompt.removed)


def assign(drop_rows: Sequence[DropRow], config: RunConfig, watch: Watch) -> Splits:
    """
    Assign all rows to held-out records, training and dev, and leave out near-duplicates of held-out records.

    Dev rows are training rows if there are fewer than `DEV_ROWS`. `drop_rows` must be sorted as by `read_drops`. Raises
    what `watch` raises.
    """
    unit = config.unit or choose_unit(drop_rows)
    # The settings alone say what is judged on, never what was dropped.
    prompts = list(group_prompts(drop_rows, config.split, unit, pinned=config.gate.on == "pinned"))
    heldout = HeldOut(prompts, config.split.similarity, watch)
    rows: dict[SplitName, list[DropRow]] = {"train": [], "dev": []}
    left_out: list[LeftOut] = []
    for prompt in watch(prompts, "splitting"):
        if prompt.split != "heldout" and prompt.rows:
            parts = heldout.compare(prompt)
            left_out += parts
            near = {row for part in parts for row in part.rows}
            rows[prompt.split] += [row._replace(drop=prompt.drops[0]) for row in prompt.rows if row not in near]
    train, dev = rows.values()
    if len(dev) < DEV_ROWS:
        train, dev = [*train, *dev], []
    return Splits(prompts, heldout, train, dev, left_out, unit)


def find_groups(scored: Sequence[Prompt], common: Common, similarity: float) -> list[str]:
    """
    Return the name of each scored prompt's group, the lowest id in it, in their order.

    Two prompts are linked if they are of one unit, or have a long answer in common that is no label, or have at least
    three words in common and 0.65 of `similarity`, which is `split.similarity`, by `group_text`; a group is a connected
    component. The share was measured (`bench/groups.py`): 0.7 misses more paraphrases, 0.6 links more questions on one
    subject. Paraphrases without common words are not found.
    """
    index = SimilarityIndex(GROUP_SHARE * similarity, LEAST_SHARED)
    firsts: dict[int, int] = {}
    groups = [prompt.rows[0].id for prompt in scored]
    for number, prompt in enumerate(scored):
        text, answers = common.group_text(prompt), common.long_answers(prompt) - common.labels
        same = {number, *index.find(text), *(firsts.setdefault(key, number) for key in (hash(prompt.unit), *answers))}
        linked = {groups[other] for other in same}
        if len(linked) > 1:
            first = min(linked)
            groups = [first if group in linked else group for group in groups]
        index.add(number, text)
    return groups


def _long_answer(row: DropRow, pairs: bool) -> int:  # noqa: FBT001 - `Common.pairs`
    """
    Return the hash of an answer of eight words or more; else 0.

    With `pairs`, a shorter one is hashed after its question, if both together have eight words.
    """
    answer = tokens(row.output)
    if pairs and len(answer) < LONG_ANSWER_WORDS:
        answer = [*tokens(row.instruction), *tokens(row.input), *answer]
    return hash(tuple(answer)) if len(answer) >= LONG_ANSWER_WORDS else 0


def _frequent(hashes: "array[int]", most: int) -> frozenset[int]:
    values, counts = np.unique(np.array(hashes), return_counts=True)
    return frozenset(values[counts > most].tolist())
