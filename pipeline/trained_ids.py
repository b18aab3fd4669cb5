"""Which records a model was trained on: the list that a merged model's folder carries."""

from pathlib import Path

TRAINED_IDS_NAME = "trained-ids.txt"


def trained_ids(folder: Path) -> frozenset[str]:
    """Return the ids of the records that the model in `folder` was trained on; none where it has no list, as a base."""
    try:
        text = (folder / TRAINED_IDS_NAME).read_text(encoding="ascii")
    except FileNotFoundError:
        return frozenset()
    return frozenset(text.split())
