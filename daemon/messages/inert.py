"""Words of others (file names, reasons, labels of rows), made harmless in whatever a message is shown by."""

import re

from pipeline.wording import printable

#: Characters that make links, mentions, emphasis or markup somewhere, and what looks like them and makes none.
_LOOKALIKES = str.maketrans("<>@*`[]|~#\\&", "‹›＠∗ˋ［］¦∼＃＼＆")  # noqa: RUF001 - they are to look alike
#: A dot that some service takes for that of a host's name; those of our own files are none.
_DOT = re.compile(r"\.(?=[^\W\d_])(?!(?:jsonl?|toml)\b)")
_WIDTH = 160


def inert(text: str, width: int = _WIDTH) -> str:
    """
    Return the beginning of `text` on one line, as plain words in Markdown, HTML and the dialects of chat services.

    Nothing in it is a link, a mention or an address.
    """
    seen = printable(text)
    clipped = seen if len(seen) <= width else f"{seen[: width - 1]}…"
    return _DOT.sub("․", clipped.translate(_LOOKALIKES).replace("://", "∶∕∕"))  # noqa: RUF001
