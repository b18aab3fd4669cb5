"""The evidence card's answers: what both models said to the records that they differ most on."""

from collections.abc import Sequence

from pipeline.report.examples import MOST_CHARACTERS
from pipeline.report.facts import Answer, Example, Report
from pipeline.report.markup import Child, Html, folded, join, section, tag
from pipeline.wording import count, plain, signed

_PREVIEW = 90


def answers(card: Report) -> Html:
    """Return the section of the worst regressions and the best gains; nothing without any."""
    names = {drop.id: drop.name for drop in card.drops}
    parts = [
        _group(f"Answered worse: the {_most(card.regressions)}", card.regressions, names),
        _group(f"Answered better: the {_most(card.gains)}", card.gains, names),
    ]
    lead = "Real records of the held-out set, with the answer that was expected and those of both models."
    return section("Read for yourself", *parts, lead=lead)


def _most(examples: Sequence[Example]) -> str:
    return f"{len(examples)} that changed most" if len(examples) > 1 else "one that there is"


def _group(title: str, examples: Sequence[Example], names: dict[int, str]) -> list[Html]:
    if not examples:
        return []
    return [tag("h3", title), *[_one(example, names) for example in examples]]


def _one(example: Example, names: dict[int, str]) -> Html:
    kind = "good" if example.difference > 0 else "bad"
    asked = " ".join((example.input or example.instruction).split())
    preview = asked[:_PREVIEW] + ("…" if len(asked) > _PREVIEW else "")
    head = [
        tag("span", f"{signed(example.difference)} points", class_=f"delta {kind}"),
        f": {plain(example.champion.score)} became {plain(example.candidate.score)}",
        tag("span", preview, class_="preview", dir="auto") if preview else None,
    ]
    expected = "Expected, any of these" if len(example.references) > 1 else "Expected"
    return folded(
        head,
        _text("Instruction", example.instruction),
        _text("Input", example.input),
        [_text(expected if not place else "", text) for place, text in enumerate(example.references)],
        tag("div",
            tag("div", _said("Champion", example.champion)), tag("div", _said("New model", example.candidate)),
            class_="pair"),
        tag("p", _where(example, names), class_="note"),
    )  # fmt: skip


def _where(example: Example, names: dict[int, str]) -> list[Child]:
    name = names.get(example.drop)
    words: list[Child] = [f"Drop {example.drop}", [" (", tag("bdi", name), ")"] if name else None]
    words += [[", ", tag("bdi", one)] for one in example.tags]
    return [*words, ", record ", tag("span", example.id, class_="code")]


def _said(who: str, answer: Answer) -> Html:
    words = [f"{who}: {plain(answer.score)} points", *answer.degenerate]
    if answer.characters > MOST_CHARACTERS:
        words.append(f"the first {MOST_CHARACTERS:,} of {count(answer.characters, 'character')}")
    return join([tag("p", ", ".join(words), class_="label"), _block(answer.text) if answer.text else _nothing()])


def _nothing() -> Html:
    return tag("p", tag("em", "an empty answer"))


def _text(title: str, text: str) -> list[Html]:
    if not text:
        return []
    return [*([tag("p", title, class_="label")] if title else []), _block(text)]


def _block(text: str) -> Html:
    # A leading line break would be dropped by the reader of the page.
    return tag("pre", "\n" + text if text.startswith("\n") else text, dir="auto")
