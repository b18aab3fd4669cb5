"""
Whose pinned files a track is judged on, and what its yardstick is besides since its previous verdict.

A file in heldout/ moves the yardstick, and anybody who may write into the inbox can put one there. So it counts at once
only where the settings judge on pinned files and name its owner; everything else there waits for a person.
"""

import stat

from daemon.rights import name_of, user
from daemon.settings import Settings

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def why_it_waits(settings: Settings, track: str, uid: int, mode: int) -> str | None:
    """
    Return why a file in a track's heldout folder waits for a person's word; `None` if it counts at once.

    `uid` and `mode` are those of the very file whose bytes were taken: its owner answers for it, unless others could
    write into it.
    """
    gate = settings.track(track).gate
    # A track may name nobody; without a settings file it is the daemon's own user.
    names = gate.pinned_by or settings.gate.pinned_by or (user(),)
    owner = name_of(uid)
    if gate.on != "pinned":
        why = f'gate.on is "{gate.on}"'
    elif not {owner, str(uid)} & set(names):
        why = f"gate.pinned_by is {', '.join(names)}"
    elif mode & _OTHERS_MAY_WRITE:
        why = f"others may write into it (mode {stat.S_IMODE(mode):o})"
    else:
        return None
    return f"it is {owner}'s, and {why}"
