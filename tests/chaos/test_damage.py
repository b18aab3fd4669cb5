"""
One damage in a track's files or rows, of each kind: the daemon starts, and the runs of every other track end.

A damaged file that hinders its track is named by `dropforge status`; a value of a column's own type may be meant.
Sampled by default (the seed stands in the table at the end; DROPFORGE_CHAOS_SEED repeats one); DROPFORGE_CHAOS=whole
tries each damage of each file and column.
"""

import os
import random
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import asked
from tests.chaos.house import MEMORY

#: Groups of damages, of which each track has one at most.
SAMPLE = 12
_NOBODY = 65534
Ask = Callable[[list[Any]], Any]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask the process that damages."""
    # Root reads a file whatever its mode, so another user does it, unless only root may run this Python.
    python = Path(sys.executable).resolve()
    may_run = all(path.stat().st_mode & stat.S_IXOTH for path in (python, *python.parents))
    is_other = os.geteuid() == 0 and may_run
    user: dict[str, Any] = {"user": _NOBODY, "group": _NOBODY, "extra_groups": ()} if is_other else {}
    with tempfile.TemporaryDirectory(prefix="dropforge-damage-", dir=MEMORY) as folder:
        os.chown(folder, *((_NOBODY,) * 2 if user else (-1, -1)))
        settings = {name for name in os.environ if name.startswith("DROPFORGE_")}
        environment = {**{name: os.environ[name] for name in os.environ.keys() - settings}, "HOME": folder}
        with asked("tests.chaos.damage_target", folder, env=environment, **user) as ask:
            yield ask


def groups(damages: list[list[Any]], chance: random.Random) -> list[list[Any]]:
    """Return all damages in groups, in which no track has two; each damage is [track, damage]."""
    chance.shuffle(damages)
    found: list[dict[str, Any]] = []
    for track, damage in damages:
        free = next((group for group in found[-200:] if track not in group), None)
        if free is None:
            free = {}
            found.append(free)
        free[track] = damage
    return [list(group.values()) for group in found]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("where", ["files", "columns"])
def test_a_damage_stops_its_own_track_alone_and_is_named(
    ask: Ask, whole: bool, seed: int, record_property: Callable[[str, object], None], where: str
) -> None:
    every = [one for one in ask([]) if (len(one[1]) == 2) == (where == "files")]
    chosen = groups(every, random.Random(f"{seed} {where}"))
    chosen = chosen if whole else chosen[:SAMPLE]
    # Each of a group that broke something is tried alone, to see which it was.
    bad = [(one, told) for group in chosen if ask(group) for one in group if (told := ask([one]))]
    kinds = Counter(one[-1] for group in chosen for one in group)
    failed = Counter(one[-1] for one, _ in bad)
    counted = ", ".join(f"{kind} {count}/{failed[kind]}" for kind, count in sorted(kinds.items()))
    which = "all" if whole else f"seed {seed}"
    record_property(
        "table", f"damaged {where:10}{which:12}{sum(kinds.values()):5} tried{len(bad):4} failed   {counted}"
    )
    words = "\n".join(f"{one}: {'; '.join(map(str, told))}" for one, told in bad)
    assert not bad, f"seed {seed}, {len(bad)} of {sum(kinds.values())}:\n{words}"
