"""HTML from Python, safe by construction: every text is escaped unless it is already `Html`."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_VOID = frozenset({"meta", "link", "br", "hr"})
#: Controls that HTML must not hold (newline and tab stay), and those that turn the order of what follows them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Html(str):
    """Markup that this package made; anything else is text."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def text(value: str) -> Html:
    """Return `value` as markup that shows it, whatever is in it; what cannot be shown is an escape as in Python."""
    shown = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), value.replace("\r\n", "\n"))
    return Html(html.escape(shown, quote=True))


def tag(name: str, /, *children: Child, **attributes: str | None) -> Html:
    """
    Return an element; `None` among children or attributes is left out.

    An attribute's trailing underscore is dropped and others become hyphens: class_="x", aria_label="y".
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{text(value)}"' for key, value in named.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Return children after each other, texts escaped."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return text(children)
    return Html("".join(join(child) for child in children))


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    head: str
    number: bool = False
    """Digits, set to the right."""
    under: Html | None = None
    """What else stands in its head, as the scale of its pictures."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[Child]], caption: str) -> Html:
    """
    Return a table whose first column names its rows; a column without any value is left out.

    On a narrow page each row becomes a block, which would take its role away from a reader's ears: hence the roles.
    """
    cells = [[join(cell) for cell in row] for row in rows]
    kept = [place for place in range(len(columns)) if any(row[place] for row in cells)]
    heads = [_head(columns[place]) for place in kept]
    body = [
        tag("tr", [_cell(columns[place], row[place], first=place == kept[0]) for place in kept], role="row")
        for row in cells
    ]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", heads, role="row"), role="rowgroup"),
        tag("tbody", body, role="rowgroup"),
        role="table",
    )
    # What is wider than the page scrolls in itself, by keyboard too.
    return tag("div", made, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _head(column: Column) -> Html:
    return tag("th", column.head, column.under, scope="col", role="columnheader", class_=_kind(column))


def _kind(column: Column) -> str | None:
    return "number" if column.number else None


def _cell(column: Column, content: Html, *, first: bool) -> Html:
    if first:
        return tag("th", content, scope="row", role="rowheader")
    return tag("td", content, role="cell", class_=_kind(column), data_label=column.head if content else None)


def facts(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Return a list of names and values; a pair without a value is left out."""
    made = [(name, join(value)) for name, value in pairs]
    return tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in made if value])


def folded(summary: Child, *children: Child, class_: str | None = None) -> Html:
    """Return a part that a reader opens; no script is needed for it."""
    return tag("details", tag("summary", summary), *children, class_=class_)


def section(title: str, *children: Child, lead: str = "") -> Html:
    """Return a section under its heading; nothing if there is nothing in it."""
    body = join(children)
    if not body:
        return body
    return tag("section", tag("h2", title), tag("p", lead, class_="lead") if lead else None, body)
