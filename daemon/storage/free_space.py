"""How much is free on the state folder's disk, and the mark under which nothing new begins."""

import os

from daemon.settings.model import Settings
from pipeline.words import size_words


class FreeSpace:
    """The room on the file system that the state folder lies on."""

    def __init__(self, settings: Settings) -> None:
        """Look at the state folder of `settings`, which need not exist."""
        self._root = settings.state_folder
        self.low_water_bytes = settings.disk.low_water_bytes

    def free_bytes(self) -> int:
        """Return what an ordinary user may still write."""
        folder = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def shortage(self) -> str:
        """Return in words that the disk is under the low-water mark; empty if it is not."""
        free = self.free_bytes()
        if free >= self.low_water_bytes:
            return ""
        mark = size_words(self.low_water_bytes)
        return (
            f"the disk of {self._root} has {size_words(free)} free, under the {mark} of disk.low_water_bytes: "
            "no run begins and files stay in the inbox until there is room (dropforge gc --dry-run)"
        )
