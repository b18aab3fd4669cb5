"""A run's cost, summed over the results of its attempts."""

from collections.abc import Iterator
from pathlib import Path

from pipeline import durable
from pipeline.contract import RESULT_NAME, StepResult
from pipeline.report.facts import RunCost
from pipeline.words import count, duration, size_words

#: From here on a price has two decimals, below two digits.
_SMALL_PRICE = 0.1


def run_cost(run_folder: Path, gain: float | None) -> RunCost:
    """Return the cost of all attempts of a run that left a result; `gain` is the verdict's, in points."""
    results = list(_results(run_folder))
    seconds, prices = sum(one.seconds for one in results), [one.price for one in results if one.price is not None]
    price = sum(prices) if prices else None
    points = gain if gain is not None and gain > 0 else None
    return RunCost(
        seconds=seconds,
        tokens=round(sum(_tokens(one) for one in results)),
        peak_memory_bytes=max((one.peak_memory_bytes for one in results if one.peak_memory_bytes), default=None),
        price=price,
        seconds_per_point=None if points is None else seconds / points,
        price_per_point=None if points is None or price is None else price / points,
    )


def cost_words(cost: RunCost) -> str:
    """Return a run's cost in one line: time, tokens, peak memory, price, and the cost of each point gained."""
    words = [duration(cost.seconds)] if cost.seconds else []
    if cost.tokens:
        words.append(count(cost.tokens, "token"))
    if cost.peak_memory_bytes:
        words.append(f"{size_words(cost.peak_memory_bytes)} of memory")
    if cost.price is not None:
        words.append(f"price {price_words(cost.price)}")
    line = ", ".join(words)
    if cost.seconds_per_point is None:
        return line
    price = "" if cost.price_per_point is None else f", {price_words(cost.price_per_point)}"
    return f"{line}; a point gained: {duration(cost.seconds_per_point)}{price}"


def price_words(price: float) -> str:
    """Format a price with two decimals, below 0.1 with two significant digits: 12.50, 0.0031."""
    return f"{price:,.2f}" if price >= _SMALL_PRICE or not price else f"{price:.2g}"


def _results(run_folder: Path) -> Iterator[StepResult]:
    for path in sorted(run_folder.glob(f"attempts/*/{RESULT_NAME}")):
        try:
            yield StepResult.model_validate(durable.read_json(path))
        except (OSError, ValueError):
            continue  # it cannot be read, and its cost is not known


def _tokens(result: StepResult) -> float:
    """Return the number of tokens that an attempt trained on or generated."""
    made = result.artifact or {}
    asked = [made[role] for role in ("candidate", "champion") if isinstance(made.get(role), dict)]
    generated = sum(one["generated"] * one["answer_tokens"] for one in asked)
    trained = [one["tokens"] for one in made.get("candidates", ())] or [made.get("trained_tokens", 0)]
    return float(sum(trained) + generated)
