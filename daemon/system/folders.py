"""The two folders of an installation, as types that cannot be taken for each other."""

from pathlib import Path
from typing import NewType

#: Database, locks, notes and spool: on a local disk.
StateFolder = NewType("StateFolder", Path)
#: Drops, runs, models and predictions: where the steps run they are seen, too. By default it is the state folder.
WorkFolder = NewType("WorkFolder", Path)
