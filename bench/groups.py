"""
Measure which held-out records pass for one question in other words, and which pairs of paraphrases are found.

    python bench/groups.py [FILE ...]

FILE is an Alpaca JSONL file: half of its prompts, by turns, are held out. Where its questions hold two sentences that
say nearly the same ("Sentence 1: ... Sentence 2: ...", as PAWS), these pairs are a set of their own. Beside them stand
made ones: the demo's messages, sums of one form, and paraphrases of 20 words: groups of five with one word in ten
changed, and families of 20 and of 200 rows with one in five changed. Printed is for shares of split.similarity (0.5),
from the one at which records leave down, how many groups there are of those that are left, and how large the largest
one is; then the seconds of all. Exit code 1 if, at the share that is used, a made set is outside its bounds (`bounds`).

Measured at the share that is used, 0.65: of 200 pairs of PAWS, 58 are so near that one leaves; the other 142 are all
linked. 669 records of 200 made questions, each asked in five ways, are 200 groups; 418 of 150 questions, in 20 ways,
146; 402 of 15 questions, in 200 ways, 16. Unlike records are hardly ever linked: two of 493 of Alpaca's, four of 659 of
GSM8K's and one of 99 of PAWS's (the same subject in other words), none of 503 of WNUT17's, 100 of Yelp's and 100 of
Amazon's. 2,000 sums of one form stay 2,000, and 3,662 messages of the demo 3,649.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from rich.console import Console
from rich.table import Table

from pipeline.prepare import decontaminate
from pipeline.prepare.decontaminate import Common, HeldOut
from pipeline.prepare.split import DropRow, Prompt, SplitName
from tests.demo_data import INSTRUCTION, generate_messages

SIMILARITY = 0.5
SHARES = (1.0, 0.8, 0.7, 0.65, 0.6, 0.5, 0.3)
PAIR = re.compile(r"Sentence 1: (.*)\nSentence 2: (.*)\n")


class Row(NamedTuple):
    """A record's texts."""

    instruction: str
    given: str
    answer: str


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    table = Table("", "left", *(f"{share:g}" for share in SHARES), "s", title="groups (the largest one)")
    kept = True
    for name, rows, every in sets(parser.parse_args().files):
        started = time.perf_counter()
        scored, common = compare(rows, every)
        found = {share: linked(scored, common, share) for share in SHARES}
        shown = (f"{len(sizes):,} ({max(sizes.values())})" for sizes in found.values())
        table.add_row(name, f"{len(scored):,}", *shown, f"{time.perf_counter() - started:.1f}")
        least, most = bounds(name, len(scored))
        kept = kept and least <= len(found[decontaminate.GROUP_SHARE]) <= most
    Console(width=140).print(table)
    return 0 if kept else 1


def bounds(name: str, left: int) -> tuple[int, int]:
    """Return the least and the most groups that a set may have, if `left` records are left."""
    most = {"5 rows each": 210, "20 rows each": 170, "200 rows each": 30}.get(name, left)
    return left if name.startswith("sums") else 1, most


def sets(files: Iterable[Path]) -> Iterator[tuple[str, list[Row], int]]:
    """Yield each set's name and rows, and of how many rows one is held out."""
    for path in files:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        prompts = {(row["instruction"], row.get("input", "")): row["output"] for row in rows}
        yield path.stem, [Row(*prompt, answer) for prompt, answer in prompts.items()], 2
        pairs = [match.groups() for row in rows if (match := PAIR.search(row["instruction"]))]
        if pairs:
            yield f"{path.stem}, pairs", [Row(text, "", "yes") for pair in pairs for text in pair], 1
    messages = generate_messages(7)
    for count in (340, 2000, 10_000):
        yield f"demo {count:,}", [Row(INSTRUCTION, next(messages).text, "desk") for _ in range(count)], 2
    for count in (400, 4000):
        yield f"sums {count:,}", [Row(f"What is {n % 89 + 10} + {n // 89 + 10}?", "", "1") for n in range(count)], 2
    dice = random.Random(7)
    for count, size, share, every in ((200, 5, 0.1, 1), (150, 20, 0.2, 7), (15, 200, 0.2, 7)):
        cases = [[f"word{dice.randrange(10**9)}" for _ in range(20)] for _ in range(count)] * size
        dice.shuffle(cases)
        yield f"{size} rows each", [Row(changed(dice, case, share), "", "yes") for case in cases], every


def changed(dice: random.Random, words: Sequence[str], share: float) -> str:
    """Change each word with probability `share`."""
    return " ".join(f"other{dice.randrange(10**9)}" if dice.random() < share else word for word in words)


def compare(rows: list[Row], every: int) -> tuple[list[Prompt], Common]:
    """Return the held-out rows that would be scored, and what does not count of them."""
    content = []
    for number, row in enumerate(rows):
        name = f"{number:09}"
        split: SplitName = "train" if number % every else "heldout"
        own = [DropRow(name, name, False, 0, number, 1, *row, ())]  # noqa: FBT003 - a field, not a flag
        content.append(Prompt(split, name, [], own, (1,)))
    heldout = HeldOut(content, SIMILARITY)
    return [heldout.prompts[number] for number in heldout.near], heldout.common


def linked(scored: list[Prompt], common: Common, share: float) -> Counter[str]:
    """Return the groups with their sizes."""
    with mock.patch.object(decontaminate, "GROUP_SHARE", share):
        return Counter(decontaminate.find_groups(scored, common, SIMILARITY))


if __name__ == "__main__":
    sys.exit(main())
