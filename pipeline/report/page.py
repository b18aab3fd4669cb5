"""The evidence card as one page: `report.html` needs no script, no other file and no network."""

from collections.abc import Sequence

from pipeline.artifacts import GuardResult, SliceResult, Verdict
from pipeline.report.answers import answers
from pipeline.report.facts import Report, is_nearly_failed
from pipeline.report.markup import Child, Column, Html, section, table, tag
from pipeline.report.plots import (
    axis_picture,
    flips_picture,
    guard_picture,
    interval_picture,
    slice_picture,
    slice_scale,
    swatch,
)
from pipeline.report.sources import checks, origin, training, what_was_judged
from pipeline.report.story import BADGES, change_words, digits, margin_words
from pipeline.report.style import CSS
from pipeline.wording import cases, count, p_words, plain, signed, span

#: Nothing is loaded, run, sent or framed, whatever a record holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_GUARD_STATES = {"passed": "✓ passed", "failed": "✗ failed", "shown": "shown only"}


def page(card: Report) -> str:
    """Return the whole page; the same card gives the same bytes."""
    verdict = card.verdict
    title = f"{BADGES[verdict.outcome]}: run {card.run} of track {card.track}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    body = tag(
        "body",
        tag("header", _first_screen(card)),
        tag("main", _gain(card), _guards(verdict), _slices(verdict), answers(card), what_was_judged(card),
            checks(card), training(card), origin(card)),
        class_=verdict.outcome,
    )  # fmt: skip
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _first_screen(card: Report) -> list[Child]:
    story = card.story
    steps = [
        tag("li", step.words, tag("code", step.command, class_="command") if step.command else None)
        for step in story.next_steps
    ]
    return [
        tag("p", tag("span", BADGES[card.verdict.outcome], class_="badge"),
            tag("span", f"Run {card.run} of track ", tag("bdi", card.track)), class_="which"),
        tag("h1", story.headline),
        tag("div",
            tag("div", tag("h2", "Why"), tag("ul", [tag("li", words) for words in story.why])) if story.why else None,
            tag("div", tag("h2", "What to do next"), tag("ul", steps)) if steps else None,
            class_="answer"),
        _headline_numbers(card),
    ]  # fmt: skip


def _headline_numbers(card: Report) -> Html | None:
    verdict = card.verdict
    if verdict.candidate_score is None or verdict.champion_score is None or verdict.gain is None:
        return None
    generation = verdict.champion_generation
    names = {0: "the base model", None: ""}
    which = names.get(generation, f"generation {generation}")
    shown = (
        ("New model", plain(verdict.candidate_score), f"{card.metric_title}, of 100 points"),
        ("Champion", plain(verdict.champion_score), which),
        ("Gain", signed(verdict.gain), f"{span(verdict.interval)} (98 %)" if verdict.interval else ""),
    )
    return tag(
        "dl",
        [tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else None))
         for name, value, more in shown],
        class_="big",
    )  # fmt: skip


def _gain(card: Report) -> Html:
    verdict, least = card.verdict, card.min_gain
    drawn = interval_picture(verdict, least)
    if not drawn or verdict.gain is None or verdict.interval is None:
        return section("The verdict in one sentence", tag("p", verdict.sentence))
    entries = [
        (swatch("span"), f"gain {signed(verdict.gain)} points, 98 % interval {span(verdict.interval)}"),
        (swatch("zero"), "no change"),
        (swatch("needed"), f"smallest gain that promotes: {signed(least)}"),
    ]
    if verdict.smallest_detectable_gain is not None:
        smallest, often = signed(verdict.smallest_detectable_gain), cases(verdict.detectable_power)
        entries.append((swatch("seen"), f"smallest gain that is promoted in {often}: {smallest}"))
    if verdict.noise is not None:
        entries.append((swatch("noise"), f"noise of asking one model twice: {plain(verdict.noise.points, 2)}"))
    test = None
    if verdict.p_value is not None:
        limit = f"the limit is {card.p_value_limit:g}"
        test = tag("p", f"{p_words(verdict.p_value)} (one-sided, {verdict.test}); {limit}.", class_="note")
    flips = flips_picture(verdict)
    kinds = (("good", verdict.wins, "better"), ("same", verdict.ties, "equal"), ("bad", verdict.losses, "worse"))
    legend = [(swatch(kind), f"{number:,} {word}") for kind, number, word in kinds]
    return section(
        "How sure is the gain?",
        tag("p", verdict.sentence),
        tag("figure", drawn, _legend(entries), tag("figcaption", "Points; the true gain lies in the interval 98 times "
            "in 100.")),
        test,
        tag("h3", f"What became of the {count(verdict.records, 'record')}"),
        tag("figure", flips, _legend(legend)) if flips else None,
    )  # fmt: skip


def _legend(entries: Sequence[tuple[Html, str]]) -> Html:
    return tag("ul", [tag("li", sign, words) for sign, words in entries], class_="legend")


def _guards(verdict: Verdict) -> Html:
    order = {"failed": 0, "passed": 1, "shown": 2}
    guards = sorted(verdict.guards, key=lambda guard: (order[guard.state], not is_nearly_failed(guard)))
    if not guards:
        return Html("")
    columns = (
        Column("Guard"), Column("Champion", number=True), Column("New model", number=True),
        Column("Change", number=True), Column("Limit", number=True), Column("Against the limit"),
        Column("Records", number=True), Column("State"),
    )  # fmt: skip
    failed = sum(guard.state == "failed" for guard in guards)
    nearly = sum(is_nearly_failed(guard) for guard in guards)
    lead = f"{failed or 'None'} of {len(guards)} failed" + (f", {nearly} nearly" if nearly else "") + "."
    note = (
        "A guard fails on harm that is shown beyond chance, or beyond its limit. Bars: the line in the middle is no "
        "change, to the right of it is harm, the dashed line is the limit."
    )
    return section("What must not get worse", table(columns, [_guard_row(guard) for guard in guards], note), lead=lead)


def _guard_row(guard: GuardResult) -> list[Child]:
    places = digits(guard)
    bound = f"at best {signed(guard.bound, places)}" if guard.bound is not None and guard.state == "failed" else ""
    nearly = is_nearly_failed(guard)
    words = "! nearly failed" if nearly else _GUARD_STATES[guard.state]
    return [
        tag("span", guard.label, dir="auto"),
        _compared_with(guard),
        None if guard.candidate is None else plain(guard.candidate, places),
        [change_words(guard), tag("small", bound) if bound else None],
        margin_words(guard),
        guard_picture(guard),
        None if guard.records is None else f"{guard.records:,}",
        tag("span", words, class_=f"state {'nearly' if nearly else guard.state}"),
    ]


def _compared_with(guard: GuardResult) -> Child:
    """Return the score on the other side: the champion's, but for the guard that goes back to the base model."""
    if guard.champion is None:
        return None
    score = plain(guard.champion, digits(guard))
    return [score, tag("small", "the base model")] if guard.guard == "general_base" else score


def _slices(verdict: Verdict) -> Html:
    if not verdict.slices:
        return Html("")
    ends = slice_scale(verdict.slices)
    columns = (
        Column("Records of"), Column("Records", number=True), Column("Champion", number=True),
        Column("New model", number=True), Column("Gain", number=True), Column("Interval", number=True),
        Column("On one scale", under=axis_picture(ends, "points")),
    )  # fmt: skip
    rows: list[list[Child]] = [[*_slice_row(one), slice_picture(one, ends)] for one in verdict.slices]
    kinds = {one.kind for one in verdict.slices}
    lead = "The same records, by where they come from."
    if {"established", "new"} <= kinds:
        lead += (
            " New are those of drops that the champion was not trained on: a new drop brings its own questions, so a "
            "gain that is only there says less."
        )
    if more := verdict.slices_not_listed:
        lead += f" Not listed: {count(more, 'drop or tag', 'drops and tags')} of too few records to decide anything."
    shown = table(columns, rows, "Points of the primary metric; a dot is the gain, a line its interval.")
    return section("Where it gained and lost", shown, lead=lead)


def _slice_row(one: SliceResult) -> list[Child]:
    return [
        tag("span", one.label, dir="auto"),
        f"{one.records:,}",
        plain(one.champion),
        plain(one.candidate),
        signed(one.gain),
        span(one.interval) if one.interval else None,
    ]
