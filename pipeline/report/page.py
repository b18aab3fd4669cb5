"""The evidence card as one page: `report.html` needs no script, no other file and no network."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import durable
from pipeline import words as wording
from pipeline.artifacts import JSON_NAME, PAGE_NAME
from pipeline.report import plots, tables
from pipeline.report.cost import cost_words
from pipeline.report.examples import MOST_CHARACTERS
from pipeline.report.facts import BlindReview, Report, is_nearly_failed
from pipeline.report.story import p_value_words, review_words

if TYPE_CHECKING:
    from jinja2 import Environment


def write_files(folder: Path, report: Report) -> None:
    """Write report.json and report.html into `folder`, over those that are there."""
    durable.write_json(folder / JSON_NAME, report.model_dump(mode="json"))
    durable.write_bytes(folder / PAGE_NAME, render_page(report).encode())


def add_review(folder: Path, review: BlindReview) -> None:
    """Write the card in `folder` anew with what people judged since. Raises `ValueError` if its data are damaged."""
    report = Report.model_validate(durable.read_json(folder / JSON_NAME))
    write_files(folder, report.model_copy(update={"review": review}))


def render_page(report: Report) -> str:
    """Return the whole page; the same report gives the same bytes."""
    template = _environment().get_template("report.html.jinja")
    source = template.render(
        report=report,
        verdict=report.verdict,
        dataset=report.dataset,
        evaluation=report.evaluation,
        badge=report.verdict.outcome.replace("_", " ").capitalize(),
        settings=json.dumps(report.settings, indent=2, ensure_ascii=False, sort_keys=True),
        versions=_versions(report),
    )
    return wording.show_controls(source)


def _versions(report: Report) -> list[str]:
    """Return the programs that made and asked the models, each with its version."""
    adapter, evaluation = report.adapter, report.evaluation
    found = (adapter.versions if adapter else {}) | (evaluation.versions if evaluation else {})
    return [f"{name} {version}" for name, version in sorted(found.items())]


@cache
def _environment() -> "Environment":
    """Return the templates' surroundings: every text is escaped, and a name that is not there is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415 - a quick start

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "p_words", "plain", "seconds", "signed", "size_words", "span", "start_words", "tick"):
        made.filters[name] = getattr(wording, name)
    made.filters |= {"cost": cost_words, "p_value_of": p_value_words, "review": review_words}
    made.filters["thousands"] = "{:,}".format
    made.filters["nonzero"] = lambda number: f"{number:,}" if number else ""
    made.globals |= {"plots": plots, "tables": tables, "most_characters": MOST_CHARACTERS}
    made.tests["nearly_failed"] = is_nearly_failed
    return made
