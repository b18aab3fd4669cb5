"""What the page is made of beside its words: small, and of the evidence card's family."""

import re
from pathlib import Path

import daemon.web.server
import pipeline.report.page

STATIC = Path(daemon.web.server.__file__).with_name("static")
CARD = Path(pipeline.report.page.__file__).with_name("templates") / "style.css"
_COLOURS = re.compile(r"^:root \{.*?^\}$.*?^\}$", re.DOTALL | re.MULTILINE)


def test_the_page_has_the_colours_of_the_card() -> None:
    page, card = (_COLOURS.search(path.read_text()) for path in (STATIC / "style.css", CARD))
    assert page is not None
    assert card is not None
    assert page[0] == card[0]
