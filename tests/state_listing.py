"""What docs/state.md says is in a state folder, compared with what is there."""

import re
from pathlib import Path

STATE = Path(__file__).parents[1].joinpath("docs", "state.md").read_text(encoding="utf-8")
#: The paths in the first column of each table; words in capitals stand for any name.
LISTED = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`[^|]+) \|", STATE, re.MULTILINE)))
_PATTERNS = [
    re.compile(re.sub(r"\b[A-Z][A-Z0-9]*\b", "[^/]+", path.replace(".", "\\.")) + (".*" if path.endswith("/") else ""))
    for path in LISTED
]


def unlisted(folder: Path) -> list[str]:
    """Return the files and links in a state folder that no line of docs/state.md names, relative to it."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return [name for name in names if not any(pattern.fullmatch(name) for pattern in _PATTERNS)]
