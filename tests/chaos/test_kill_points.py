"""
Every operation killed at every system call that changes a file, or with that call failing; then recovered and judged.

Sampled by default (the seed stands in the table at the end; DROPFORGE_CHAOS_SEED repeats one); DROPFORGE_CHAOS=whole
tries every point. Needs strace and the right to trace.
"""

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chaos.conftest import asked
from tests.chaos.house import MEMORY
from tests.chaos.operations import OPERATIONS

#: What a disk says when it is broken or full.
ERRORS = {"fsync": "EIO", "fdatasync": "EIO", "pwrite64": "ENOSPC", "write": "ENOSPC"}
SAMPLE = {"killed": 2, "failing": 1}
Ask = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None and "CI" not in os.environ, reason="it needs strace (Debian: strace)"
)


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask the process that kills."""
    with (
        tempfile.TemporaryDirectory(prefix="dropforge-kill-", dir=MEMORY) as folder,
        asked("tests.chaos.kill_target", folder) as ask,
    ):
        yield lambda **request: ask(request)


def points(counted: dict[str, int], how: str) -> list[tuple[str, int, str | None]]:
    """Return every call of the operation with its number and the error that it is to end with."""
    calls = dict.fromkeys(counted) if how == "killed" else ERRORS
    return [(call, when, error) for call, error in calls.items() for when in range(1, counted.get(call, 0) + 1)]


def sample(every: list[tuple[str, int, str | None]], size: int, seed: str) -> list[tuple[str, int, str | None]]:
    """Choose `size` points, of as many different calls as there are: most points are writes to the database."""
    chance = random.Random(seed)
    calls = sorted({call for call, _, _ in every})
    chosen = chance.sample(calls, min(size, len(calls)))
    return [chance.choice([point for point in every if point[0] == call]) for call in chosen]


@pytest.mark.parametrize("how", ["killed", "failing"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_is_hit_at_any_point_leaves_nothing_lost_double_or_half(
    ask: Ask, whole: bool, seed: int, record_property: Callable[[str, object], None], operation: str, how: str
) -> None:
    every = points(ask(operation=operation), how)
    assert every, "strace saw nothing"
    chosen = every if whole else sample(every, SAMPLE[how], f"{seed} {operation} {how}")
    bad: list[str] = []
    failed: Counter[str] = Counter()
    for call, when, error in chosen:
        answer = ask(operation=operation, call=call, when=when, error=error)
        wrong = [*answer["broken"], *_wrong_end(answer["end"], how)]
        if wrong:
            failed[call] += 1
            bad.append(f"{operation}, {call} {when} {error or 'killed'} ({answer['end']}): {'; '.join(wrong)}")
    tried = Counter(call for call, _, _ in chosen)
    told = ", ".join(f"{call} {count}/{failed[call]}" for call, count in sorted(tried.items()))
    which = "all" if whole else f"seed {seed}"
    record_property("table", f"{operation:28}{how:9}{which:12}{len(chosen):4} tried{len(bad):4} failed   {told}")
    assert not bad, f"seed {seed}, {len(bad)} of {len(chosen)}:\n" + "\n".join(bad)


def _wrong_end(end: str, how: str) -> list[str]:
    if how == "killed":
        return [] if end == "killed" else ["the operation was not killed"]
    return [] if end == "done" or end.startswith("failed: ") else ["the operation did not fail cleanly"]
