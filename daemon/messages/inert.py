"""Escape foreign text (file names, reasons, labels of rows) for mail, chat, Markdown and HTML alike."""

import re

from daemon.settings.model import Settings
from pipeline.words import printable

#: Characters that make links, mentions, emphasis or markup somewhere, and similar ones that do not.
_LOOKALIKES = str.maketrans("<>@*`[]|~#\\&", "‹›＠∗ˋ［］¦∼＃＼＆")  # noqa: RUF001 - they are to look alike
_DOTTED = re.compile(r"[\w-]+(?:\.[\w-]+)+")
#: Not a top-level domain: suffixes of files, and words with a digit or an underscore.
_NO_HOST = re.compile(r"jsonl?|toml|txt|csv|tsv|log|html|parquet|gz|\w*[\d_]\w*", re.IGNORECASE)
_WIDTH = 160


def inert(text: str, width: int = _WIDTH) -> str:
    """Return `text` on one line, cut to about `width` characters, with markup, mentions and links disabled."""
    seen = printable(text)
    clipped = seen if len(seen) <= width else f"{seen[: width - 1]}…"
    return _DOTTED.sub(_no_link, clipped.translate(_LOOKALIKES).replace("://", "∶∕∕"))  # noqa: RUF001


def _no_link(found: re.Match[str]) -> str:
    """Return a file name or setting unchanged, so that it can be copied; put the dots of a host name in brackets."""
    section, _, name = found[0].partition(".")
    field = Settings.model_fields.get(section)
    is_setting = field is not None and name in getattr(field.annotation, "model_fields", {})
    return found[0] if is_setting or _NO_HOST.fullmatch(found[0].rpartition(".")[2]) else found[0].replace(".", "(.)")
