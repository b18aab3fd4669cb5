"""A small disk of its own for a test: ext4 in an image file, mounted, which can be filled, freed and cut off."""

import contextlib
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from pipeline import durable

needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="mounting an image needs root")


class LoopDisk:
    """A mounted image; needs mkfs.ext4 (Debian: e2fsprogs) and mount."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        """Use `folder` for the image and its mount point; an image that lies there is mounted as it is."""
        folder.mkdir(parents=True, exist_ok=True)
        self.image = folder / "disk.img"
        self.place = folder / "disk"
        self._filler = self.place / "filler"
        self._megabytes = megabytes

    def __enter__(self) -> Self:
        if not self.image.exists():
            with self.image.open("wb") as file:
                file.truncate(self._megabytes << 20)
            # -m 0: nothing is reserved for root, who would not find it full otherwise.
            subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", self.image], check=True)
        self.place.mkdir(exist_ok=True)
        # As little as possible reaches the disk by itself: no commit every few seconds, no help for unsynced renames.
        options = "loop,noauto_da_alloc,commit=600"
        subprocess.run(["mount", "-o", options, self.image, self.place], check=True)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        # Lazily: a process that is about to end may still have a file open.
        subprocess.run(["umount", "--lazy", self.place], check=True)

    def fill(self, leave: int = 0) -> None:
        """Take all that is free, but for `leave` bytes."""
        with self._filler.open("ab") as file:
            for size in (1 << 20, 1 << 16, 1 << 12, 1 << 10):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
        # What is too little for an extent of its own may still take a small file.
        with contextlib.suppress(OSError):
            for number in range(500):
                durable.write_bytes(self.place / f"filler-{number}", b"x" * 1024)
        if leave:
            with self._filler.open("ab") as file:
                file.truncate(max(self._filler.stat().st_size - leave, 0))

    def free(self) -> None:
        """Give back what was taken."""
        for path in self.place.glob("filler*"):
            path.unlink()

    def copy_as_after_a_power_cut(self, target: Path) -> None:
        """
        Copy the image as it is at this moment, into the new folder `target`.

        What the file system has not written to its disk is not in it.
        """
        target.mkdir(parents=True)
        subprocess.run(["cp", "--sparse=always", self.image, target / "disk.img"], check=True)
