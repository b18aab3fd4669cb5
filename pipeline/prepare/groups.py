"""
Which scored held-out records ask the same in other words: a group counts once in the gate's test.

Two are linked that have a long answer in common, or prompts half as similar as would take one of them out; a group is
what is linked by any chain. Half was measured (`bench/groups.py`): of the pairs of PAWS that are left it links 60 %,
where 0.7 links 30 %, and of 1,500 unlike records of real sets one pair. What shares no words is not found.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from pipeline.prepare.decontaminate import HeldoutTexts, slices
from pipeline.prepare.near_duplicates.jaccard import LEAST_SHARED, NearTexts
from pipeline.prepare.near_duplicates.ngrams import Indices

#: Of `split.similarity`. Lower finds more paraphrases, and takes more rows of one form for such.
GROUP_SHARE = 0.5


def find_groups(heldout: HeldoutTexts, scored: Sequence[int], ids: Sequence[str], similarity: float) -> list[str]:
    """
    Return of each scored record its group's name: the first of its ids, sorted.

    `scored` are the prompts' numbers in `heldout`, in ascending order, `ids` their ids; `similarity` is
    `split.similarity`.
    """
    if not ids:
        return []
    numbers = np.array(scored, np.int64)
    links = [_by_answer(heldout, numbers), *_by_prompt(heldout, numbers, GROUP_SHARE * similarity)]
    one, other = (np.concatenate(ends) for ends in zip(*links, strict=True))
    graph = sparse.coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(len(ids), len(ids)))
    places = connected_components(graph, directed=False)[1].tolist()
    names: dict[int, str] = {}
    for place, name in zip(places, ids, strict=True):
        names[place] = min(name, names.get(place, name))
    return [names[place] for place in places]


def _by_answer(heldout: HeldoutTexts, numbers: Indices) -> tuple[Indices, Indices]:
    """Link each record to the first one that has a long answer of its own."""
    asked = np.isin(heldout.answered, numbers)
    places = np.searchsorted(numbers, heldout.answered[asked])
    _, firsts, which = np.unique(heldout.answers[asked], return_index=True, return_inverse=True)
    return places, places[firsts[which]]


def _by_prompt(heldout: HeldoutTexts, numbers: Indices, similarity: float) -> Iterator[tuple[Indices, Indices]]:
    """Yield the records whose prompts are similar, part by part; memory is a part's, whatever the data."""
    texts = heldout.texts.take(numbers)
    for part in slices(texts):
        own = np.arange(part.start, part.stop)
        near = NearTexts(texts.take(own), heldout.common, similarity, LEAST_SHARED)
        for later in slices(texts, part.start):
            theirs, ours = near.similar(texts.take(np.arange(later.start, later.stop)))
            yield theirs + later.start, ours + part.start
