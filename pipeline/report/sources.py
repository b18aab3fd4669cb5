"""The evidence card's sources: the data and its checks, the training, and what names every part of it."""

import json
import statistics
from collections.abc import Iterable, Sequence

from pipeline.artifacts import Adapter, LengthBin, Overlap, Scores
from pipeline.report.facts import Report
from pipeline.report.markup import Child, Column, Html, facts, folded, section, table, tag
from pipeline.report.plots import curve_picture, lengths_picture, swatch
from pipeline.wording import count, plain, seconds, signed, size

_RULES = {
    "prompt": "the same prompt",
    "answer": "the same long answer",
    "ngram": "13 words in a row in common",
    "minhash": "most 3-word sequences in common",
}


def what_was_judged(card: Report) -> Html:
    """Return the data: drops, rows, and what was left out."""
    data = card.dataset
    columns = (
        Column("File"), Column("Drop", number=True), Column("Used for"), Column("Rows", number=True), Column("sha256"),
    )  # fmt: skip
    roles = {"train": "training and held-out", "heldout": "held-out"}
    rows: list[list[Child]] = [
        [tag("bdi", drop.name), str(drop.id), roles[drop.role], f"{drop.rows:,}",
         tag("span", drop.sha256, class_="code")]
        for drop in card.drops
    ]  # fmt: skip
    counted = facts([
        ("Rows to train on", f"{data.train_rows:,}"),
        ("Rows for the loss curve", _number(data.dev_rows)),
        ("Held-out records", [f"{data.heldout_rows:,}", ", a set of your own" if data.heldout_pinned else None]),
        ("Duplicates left out", _number(data.duplicates)),
        ("Answers replaced by a later drop's", _number(data.replaced)),
        ("Rows with control tokens, left out", _number(data.rows_with_control_tokens)),
        ("Held-out records too long to ask", _number(card.report.records_too_long if card.report else 0)),
    ])  # fmt: skip
    drops = table(columns, rows, "What was dropped") if rows else None
    return section("The data", [tag("p", words, class_="warning") for words in data.warnings], counted, drops)


def checks(card: Report) -> Html:
    """Return what was done so that the numbers can be believed: leaks, noise, how often the set was used."""
    data, verdict, report = card.dataset, card.verdict, card.report
    noise = verdict.noise
    seen = data.seen_by_champion + (report.records_seen_by_champion if report else 0)
    asked_twice = None
    if noise is not None:
        mean = f"by {plain(noise.points, 2)} points in the mean"
        asked_twice = f"{noise.changed:,} of {count(noise.records, 'answer')} changed, {mean}"
    before = f"{count(verdict.uses, 'candidate')} before this one"
    if verdict.same_set_uses:
        before += f", {verdict.same_set_uses:,} of them on exactly these records"
    found = facts([
        ("Training rows with a held-out prompt, left out", f"{data.removed_heldout:,}"),
        ("Training rows too near to a held-out record, left out", f"{data.near_duplicates:,}"),
        ("Held-out records too near to each other, left out", _number(data.heldout_duplicates)),
        ("Held-out records that the champion at the time was trained on, or on near copies of, left out",
         _number(seen)),
        ("Scored records that the new model was trained on",
         f"{report.records_seen_by_candidate:,}" if report else None),
        ("One model asked twice", asked_twice),
        ("Judged on this track", before if report else None),
        ("A language model's opinion", _opinion(card)),
    ])  # fmt: skip
    return section("Can these numbers be believed?", found, _overlaps(data.overlaps), _former(card))


def training(card: Report) -> Html:
    """Return the training with its curves, and what the run took."""
    adapter, cost = card.adapter, card.cost
    if adapter is None:
        return Html("")
    curve = curve_picture(adapter.loss_curve, adapter.dev_curve)
    legend = [tag("li", swatch("trained"), "training rows")]
    if adapter.dev_curve:
        legend.append(tag("li", swatch("dev"), "dev rows, not trained on"))
    lengths = lengths_picture(adapter.lengths)
    took = {"train": "training", "merge": "merging", "candidate": "asking the new model", "champion": "the champion"}
    times = ", ".join(f"{took.get(name, name)} {seconds(value)}" for name, value in cost.seconds.items())
    return section(
        "Training and cost",
        tag("figure", tag("h3", "Loss"), curve, tag("ul", legend, class_="legend"),
            tag("figcaption", _curve_words(adapter))) if curve else None,
        tag("figure", tag("h3", "Lengths of the training rows"), lengths,
            tag("figcaption", _length_words(adapter))) if lengths else None,
        facts([
            ("Time", times), ("Device", cost.device),
            ("Tokens trained on", f"{adapter.trained_tokens:,}"),
            ("Optimizer steps", f"{adapter.optimizer_steps:,}"),
            ("Weights trained", f"{adapter.trainable_parameters:,}"),
            ("Change of these weights (L2)", plain(adapter.adapter_change, 2)),
            ("Rows too long, left out", _number(adapter.rows_too_long)),
            ("Answers generated", _some(cost.generated)), ("Answers from the cache", _some(cost.cached)),
        ]),
        _scores(card),
    )  # fmt: skip


def origin(card: Report) -> Html:
    """Return the names and hashes by which every part can be found or made again."""
    adapter, model, report = card.adapter, card.model, card.report
    generation = card.verdict.champion_generation
    champion = None if generation is None else f" (generation {generation})"
    versions = {**(adapter.versions if adapter else {}), **(report.versions if report else {})}
    hashes = facts([
        ("New model", _hash(card.verdict.candidate_model_id)),
        ("Champion", [_hash(card.verdict.champion_model_id), champion] if card.verdict.champion_model_id else None),
        ("Base model", _hash(adapter.base_model_id if adapter else str(card.settings.get("base_model_id", "")))),
        ("Adapter", _hash(adapter.adapter_sha256 if adapter else None)),
        ("Data", _hash(card.dataset.dataset_sha256)),
        ("Held-out set", _hash(card.verdict.heldout_version or card.dataset.heldout_version)),
        ("Settings", _hash(card.settings_sha256)),
        ("Merged folder", None if model is None else f"{size(model.size_bytes)}, {model.dtype}, {model.format} format"),
        ("Prompts a batch", _number(report.batch_size if report else 0)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))),
    ])  # fmt: skip
    settings = json.dumps(card.settings, indent=2, ensure_ascii=False, sort_keys=True)
    keys = [(model_id, _hash(key)) for model_id, key in sorted(report.prediction_keys.items())] if report else []
    return section(
        "Where it comes from",
        hashes,
        folded("All settings of this run", tag("pre", settings)),
        folded("Keys of the predictions, by model", facts(keys)) if keys else None,
        tag("p", "The same as data: report.json beside this page.", class_="note"),
    )


def _number(value: int) -> str | None:
    return f"{value:,}" if value else None


def _some(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _hash(value: str | None) -> Html | None:
    return tag("span", value, class_="code") if value else None


def _opinion(card: Report) -> str | None:
    judged = card.judgement
    if judged is None:
        return None
    return (
        f"{judged.model} on {count(judged.records, 'record')}: {judged.wins:,} better, {judged.losses:,} worse, "
        f"{judged.ties:,} neither; {judged.inconsistent:,} changed with the answers' order, {judged.failed:,} failed"
    )


def _overlaps(overlaps: Sequence[Overlap]) -> Html | None:
    if not overlaps:
        return None
    columns = (Column("Training row"), Column("Held-out record"), Column("In common"))
    rows: list[list[Child]] = [
        [tag("span", one.train_text, dir="auto"), tag("span", one.heldout_text, dir="auto"), _RULES[one.rule]]
        for one in overlaps
    ]
    return folded(f"Examples of what was left out ({len(overlaps)})", table(columns, rows, "Beginnings of both texts"))


def _former(card: Report) -> Html | None:
    if card.report is None or not card.report.former:
        return None
    columns = (
        Column("Former champion"), Column("Records", number=True), Column("Score", number=True), Column("Model"),
    )  # fmt: skip
    rows: list[list[Child]] = [
        [f"generation {one.generation}", f"{one.records:,}", plain(one.score), _hash(one.model_id)]
        for one in card.report.former
    ]
    return table(columns, rows, "Former champions on those of the records that they had answered, in points")


def _curve_words(adapter: Adapter) -> str:
    first, last = adapter.loss_curve[0], adapter.loss_curve[-1]
    words = f"From {plain(first.loss, 2)} at step {first.step:,} to {plain(last.loss, 2)} at step {last.step:,}"
    if adapter.dev_curve:
        best = min(adapter.dev_curve, key=lambda point: point.loss)
        words += f"; dev loss at its lowest {plain(best.loss, 2)}, at step {best.step:,}"
    return words + ". Nats a token."


def _length_words(adapter: Adapter) -> str:
    middle = _median_bin(adapter.lengths)
    words = f"Half of them have at most {middle:,} tokens, all at most {adapter.lengths[-1].tokens:,}"
    if adapter.rows_too_long:
        words += f"; {count(adapter.rows_too_long, 'longer row')} left out"
    return words + "."


def _median_bin(bins: Iterable[LengthBin]) -> int:
    known = [one for one in bins if one.rows]
    spread = [one.tokens for one in known for _ in range(one.rows)]
    return int(statistics.median_high(spread))


def _scores(card: Report) -> Html | None:
    """Return a table of everything that was measured of both models."""
    report = card.report
    if report is None:
        return None
    new, old = report.candidate, report.champion
    rows = [
        _both(name, old.metrics.get(name), new.metrics.get(name), 1)
        for name in sorted({*new.metrics, *old.metrics}, key=lambda name: (name != report.metric, name))
    ]
    rows += [
        _both("likelihood (nats a token, less is better)", old.nll, new.nll, 3),
        *[
            _both(f"{name} answers (per cent)", old.rates.get(name), new.rates.get(name), 1)
            for name in sorted({*new.rates, *old.rates})
        ],
        _both("length over the reference's", old.length_ratio, new.length_ratio, 2),
        _both("tokens an answer", *_answer_tokens(old, new), 1),
        _both("seconds an answer", old.seconds_per_answer, new.seconds_per_answer, 3),
    ]
    suites = [_both(f"suite {one.name} ({one.records:,})", one.champion, one.candidate, 1) for one in report.suites]
    columns = (
        Column("Measured"), Column("Champion", number=True), Column("New model", number=True),
        Column("Change", number=True),
    )  # fmt: skip
    return folded("Everything that was measured", table(columns, [row for row in [*rows, *suites] if row], "Means"))


def _answer_tokens(old: Scores, new: Scores) -> tuple[float | None, float | None]:
    return (old.answer_tokens or None, new.answer_tokens or None)


def _both(name: str, old: float | None, new: float | None, digits: int) -> list[Child]:
    if old is None and new is None:
        return []
    change = signed(new - old, digits) if old is not None and new is not None else None
    return [
        tag("span", name),
        None if old is None else plain(old, digits),
        None if new is None else plain(new, digits),
        change,
    ]
