"""
Drops that a person withdrew, in what was made with them: runs that have their snapshot, and wins.

A withdrawn drop leaves at the next snapshot; a run that has its own goes on. What comes of it is not promoted without a
person's word, and the other drops that were new in it are trained on again without the withdrawn one
(`drops.train_without`): after a bad verdict, too.
"""

from typing import TYPE_CHECKING

from daemon.state.states import DropState
from pipeline.errors import DropforgeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from daemon.state.tables import Drop


class Withdrawn(DropforgeError):
    """The model was trained or judged on a drop that was withdrawn since: only a person takes it all the same."""


def withdrawn(drops: "Iterable[Drop]") -> "list[Drop]":
    """Return those of a snapshot's drops, for training or held out, that were withdrawn since."""
    return [drop for drop in drops if drop.state == DropState.WITHDRAWN]


def withdrawal_words(drops: "Sequence[Drop]") -> str:
    """Say that a model was trained, or judged, on withdrawn drops, and why each was withdrawn."""
    said = []
    for role, was in (("train", "trained"), ("heldout", "judged")):
        own = [f"drop {drop.id} ({drop.name}), withdrawn since: {drop.reason}" for drop in drops if drop.role == role]
        said += [f"it was {was} on {' and '.join(own)}"] if own else []
    return ", and ".join(said)


def excuse_words(drops: "Sequence[Drop]") -> str:
    """Say what becomes of a bad verdict that may be all about withdrawn drops."""
    named = " and ".join(f"drop {drop.id} ({drop.name})" for drop in drops)
    were, it = ("was", "it") if len(drops) == 1 else ("were", "them")
    kept = f"no drop is suspended for this, and what else was new is trained on without {it}"
    return f"{named[:1].upper()}{named[1:]} {were} withdrawn meanwhile: {kept}."


def require_no_withdrawal(run_id: int, gone: "Sequence[Drop]", forcing: str) -> None:
    """Raise `Withdrawn` if a run's model was trained or judged on drops that are `gone`; `forcing` takes it still."""
    if gone:
        message = f"run {run_id} won, but {withdrawal_words(gone)}"
        again = ", ".join(f"dropforge drops restore {drop.id} --reason TEXT" for drop in gone)
        raise Withdrawn(message, f"a run on new data goes without it; to take it back: {again}; as it is: {forcing}")
