"""A member of the group in a process of their own: swaps what lies below the inbox at random, until told to stop."""

import contextlib
import os
import random
import select
import shutil
import sys
import time
from pathlib import Path

FOLDERS = ("heldout", "support", "support/heldout", "done", "rejected")
FILES = tuple(f"{letter}.jsonl" for letter in "abcdefgh")


def swap(chance: random.Random, decoy: Path) -> None:
    """Put something else in the place of a folder for a moment, and put it back."""
    # A name of its own: if the daemon has made the folder again, this one cannot be put back and stays.
    name, aside = Path(chance.choice(FOLDERS)), Path(f".aside-{time.monotonic_ns()}")
    name.rename(aside)
    try:
        kind = chance.choice(["link", "folder", "file", "pipe", "nothing"])
        if kind == "link":
            name.symlink_to(decoy)
        elif kind == "folder":
            name.mkdir()
            (name / "heldout").symlink_to(decoy)
            (name / chance.choice(FILES)).symlink_to(decoy / "secret.jsonl")
        elif kind == "file":
            name.write_text("x")
        elif kind == "pipe":
            os.mkfifo(name)
        time.sleep(chance.random() * 0.05)
    finally:
        clear(name)
        aside.rename(name)


def litter(chance: random.Random, decoy: Path) -> None:
    """Let something appear, change its kind, or vanish under the name of a drop."""
    name = Path(chance.choice(["", "support", "heldout"]), chance.choice(FILES))
    kind = chance.choice(["link", "pipe", "folder", "file", "hard link", "nothing"])
    clear(name)
    if kind == "link":
        name.symlink_to(decoy / "secret.jsonl")
    elif kind == "pipe":
        os.mkfifo(name)
    elif kind == "folder":
        name.mkdir()
    elif kind == "file":
        name.write_text(f'{{"instruction": "{chance.random()}", "output": "x"}}\n')
    elif kind == "hard link":
        name.with_name(chance.choice(FILES)).hardlink_to(name)


def clear(name: Path) -> None:
    """Remove whatever has a name."""
    with contextlib.suppress(FileNotFoundError):
        if name.is_dir() and not name.is_symlink():
            shutil.rmtree(name)
        else:
            name.unlink()


def main() -> None:
    """Race until standard input closes."""
    chance, decoy = random.Random(20261125), Path(sys.argv[1])
    while not select.select([sys.stdin], [], [], 0)[0]:
        with contextlib.suppress(OSError):
            chance.choice([swap, litter])(chance, decoy)


if __name__ == "__main__":
    main()
