"""Copies a file into the inbox so that the daemon sees it whole or not at all, and nothing there is replaced."""

import os
import shutil
import stat
import uuid
from pathlib import Path

from daemon.inbox_folders import HELDOUT
from daemon.settings import Settings
from daemon.watcher import is_passed_over, make_inbox
from pipeline import durable
from pipeline.errors import DropforgeError


class NameTaken(DropforgeError):
    """A file of the same name waits in the inbox, or the name is one that the inbox passes over."""


def copy_in(source: Path, settings: Settings, track: str, *, heldout: bool) -> Path:
    """
    Copy `source` into the inbox of a declared `track`, or its held-out folder; return the copy.

    Raises `NameTaken` if a file of that name is there, `OSError` if the inbox cannot be written.
    """
    make_inbox(settings)
    folder = settings.inbox_folder if track == "default" else settings.inbox_folder / track
    folder = folder / HELDOUT if heldout else folder
    target = folder / source.name
    if is_passed_over(os.fsencode(source.name)):
        message = f"{source.name}: the inbox takes a file of such a name for one that is still being written"
        raise NameTaken(message, "rename the file and submit it again")
    # Names that begin with a dot are in progress to the watcher.
    aside = folder / f".{uuid.uuid4().hex}.part"
    try:
        shutil.copyfile(source, aside)
        # Who may write into a file may choose what it says.
        aside.chmod(stat.S_IMODE(aside.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        durable.fsync_file(aside)
        _give_name(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    durable.fsync_folder(folder)
    return target


def _give_name(aside: Path, target: Path) -> None:
    """Let the finished copy appear as `target`, never in place of another file."""
    message = f"{target} is there already and has not been taken yet"
    hint = "wait until the daemon has taken it, or submit yours under another name"
    try:
        os.link(aside, target)
    except FileExistsError as error:
        raise NameTaken(message, hint) from error
    except OSError as error:
        # A file system without hard links: a rename would replace a file that appears in this very moment.
        if target.exists():
            raise NameTaken(message, hint) from error
        aside.rename(target)
