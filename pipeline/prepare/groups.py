"""
Which scored held-out records ask the same in other words: a group counts once in the gate's test.

Two are linked that have a long answer in common, or prompts half as similar as would take one of them out; a group is
what is linked by any chain. Half was measured (`bench/groups.py`): of the pairs of PAWS that are left it links 60 %,
where 0.7 links 30 %, and of 1,500 unlike records of real sets one pair. What shares no words is not found.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from pipeline.prepare.decontaminate import Common, long_answers
from pipeline.prepare.near_duplicates import LEAST_SHARED, SimilarityIndex
from pipeline.prepare.split import Prompt

#: Of `split.similarity`. Lower finds more paraphrases, and takes more rows of one form for such.
GROUP_SHARE = 0.5


def find_groups(scored: Sequence[Prompt], common: Common, similarity: float) -> list[str]:
    """Return of each scored prompt its group's name: the first of its ids, sorted; `similarity` is that of split."""
    if not scored:
        return []
    index = SimilarityIndex(GROUP_SHARE * similarity, LEAST_SHARED)
    firsts: dict[int, int] = {}
    links: list[tuple[int, int]] = []
    for number, prompt in enumerate(scored):
        text = common.text(prompt)
        links += [(number, other) for other in index.find(text)]
        links += [(number, firsts.setdefault(one, number)) for one in long_answers(prompt.rows) - common.labels]
        index.add(number, text)
    ends = np.array(links, np.int64).reshape(-1, 2).T
    graph = sparse.coo_array((np.ones(len(links), np.bool_), tuple(ends)), shape=(len(scored), len(scored)))
    labels = connected_components(graph, directed=False)[1].tolist()
    names: dict[int, str] = {}
    for label, prompt in zip(labels, scored, strict=True):
        names[label] = min(prompt.rows[0].id, names.get(label, prompt.rows[0].id))
    return [names[label] for label in labels]
