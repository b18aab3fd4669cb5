"""Render the evidence card: `report.html` needs no script, no other file and no network."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import data_words, durable, words
from pipeline.artifacts import JSON_NAME, PAGE_NAME
from pipeline.report import figures
from pipeline.report.facts import BlindReview, Report
from pipeline.report.story import p_value_words, review_words

if TYPE_CHECKING:
    from jinja2 import Environment

#: Characters of a text that a card keeps: with twenty records of four texts a page stays readable in mail.
MOST_CHARACTERS = 3000


def write_files(folder: Path, report: Report) -> None:
    """Write report.json and report.html into the existing `folder`, replacing older ones."""
    durable.write_json(folder / JSON_NAME, report.model_dump(mode="json"))
    durable.write_bytes(folder / PAGE_NAME, render_page(report).encode())


def add_review(folder: Path, review: BlindReview) -> None:
    """
    Rewrite report.json and report.html in `folder` with a blind review.

    Raises `ValueError` if report.json is missing or damaged.
    """
    report = Report.model_validate(durable.read_json(folder / JSON_NAME))
    write_files(folder, report.model_copy(update={"review": review}))


def render_page(report: Report) -> str:
    """Return the page as HTML; the same report gives the same bytes."""
    adapter, evaluation, outcome = report.adapter, report.evaluation, report.verdict.outcome
    versions = (adapter.versions if adapter else {}) | (evaluation.versions if evaluation else {})
    template = _environment().get_template("report.html.jinja")
    source = template.render(
        report=report,
        verdict=report.verdict,
        dataset=report.dataset,
        evaluation=evaluation,
        # Whether a win is promoted or waits is decided later.
        badge="Won" if outcome == "promoted" else outcome.replace("_", " ").capitalize(),
        settings=json.dumps(report.settings, indent=2, ensure_ascii=False, sort_keys=True),
        versions=[f"{name} {version}" for name, version in sorted(versions.items())],
    )
    return words.show_controls(source)


@cache
def _environment() -> "Environment":
    made = make_environment()
    made.filters |= {"p_value_of": p_value_words, "review": review_words}
    for worded in (data_words.start_words, data_words.warning_words):
        made.filters[worded.__name__] = worded
    made.filters["nonzero"] = lambda number: f"{number:,}" if number else ""
    made.globals["most_characters"] = MOST_CHARACTERS
    return made


def make_environment(*folders: Path) -> "Environment":
    """
    Return a new Jinja environment for card and web page: text is escaped, unknown names raise errors.

    Templates are looked for in `folders`, then in this package's `templates`; filters format numbers as
    `pipeline.words` does.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415 - a quick start

    made = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).with_name("templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "duration", "local", "plain", "short", "signed", "size_words", "span", "tick", "until"):
        made.filters[name] = getattr(words, name)
    made.filters["thousands"] = "{:,}".format
    made.filters["proposed_words"] = data_words.proposed_words
    made.globals["figures"] = figures
    return made
