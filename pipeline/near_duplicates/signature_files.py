"""
Where the signatures of drops are kept, and for how long they hold good: read by the steps and by the control plane.

Layout: `<state folder>/signatures/<sha256 of the drop>-<version>.zip`. They are a function of a drop's bytes and of
this version of the rules alone: whatever the settings are, a file that is there holds. `prepare` leaves those that it
had to make in its attempt, and the dispatcher moves them in when it publishes.
"""

FOLDER = "signatures"
#: To be raised whenever words, hashes or the layout change: older files are then no longer read, and collected.
VERSION = "v1"


def signature_name(sha256: str) -> str:
    """Return the name of the signatures of the drop with this hash."""
    return f"{sha256}-{VERSION}.zip"


def signed_drop(name: str) -> str | None:
    """Return the hash of the drop that a signature file is of; `None` if this version would not read it."""
    sha256 = name.removesuffix(f"-{VERSION}.zip")
    return sha256 if sha256 != name else None
