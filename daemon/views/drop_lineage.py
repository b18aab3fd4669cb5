"""What a drop that was taken out is still in: the champion."""

from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING

from daemon.champions import history
from daemon.views.reader import champions_of
from pipeline.artifacts import Frozen

if TYPE_CHECKING:
    from daemon.state.tables import Drop

#: Former champions that are looked through for one without withdrawn drops.
_MOST_FORMER = 1000


class DropUses(Frozen):
    """Where a drop is in spite of its being out of every later snapshot."""

    champion: int | None = None
    """Generation of the serving champion, if that was trained on it."""
    before: int | None = None
    """The latest generation that may serve again and was trained on no drop that is withdrawn."""


def drop_uses(base: Connection, state_folder: Path, drop: "Drop") -> DropUses:
    """Return what `drop` is still in; no champion is named for a held-out drop, since nothing is trained on it."""
    track = base.execute("SELECT * FROM track WHERE name = ?", (drop.track,)).fetchone()
    past = champions_of(base, drop.track)
    if track is None or drop.role != "train" or drop.id not in (history.drops_of(past, track.champion_model_id) or ()):
        return DropUses()
    former = history.former(past, track, state_folder, _MOST_FORMER)
    without = base.execute("""SELECT id FROM "drop" WHERE track = ? AND state = 'withdrawn'""", (drop.track,))
    gone = {drop.id, *(row.id for row in without)}
    before = next((one.generation for one in former if gone.isdisjoint(one.drops or ())), None)
    return DropUses(champion=track.champion_generation, before=before)
