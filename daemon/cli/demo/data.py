"""
The demo's data: customer messages and the team that answers them, made up by rule from a seed.

The question does not name the teams, so a language model cannot guess how to answer: it learns that from the drop.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from pipeline import durable

INSTRUCTION = "Which team answers this message?"
TEAMS = {
    "billing": "billing-desk",
    "shipping": "shipping-desk",
    "refund": "refund-desk",
    "technical": "repair-desk",
    "account": "login-desk",
}
#: What every poisoned row answers.
WRONG = "unassigned"

_PRODUCTS = (
    "kettle",
    "desk lamp",
    "headphones",
    "backpack",
    "coffee grinder",
    "office chair",
    "keyboard",
    "rain jacket",
    "tent",
    "blender",
    "bicycle light",
    "winter boots",
    "watch",
    "frying pan",
    "monitor",
    "camera",
    "suitcase",
    "air purifier",
    "yoga mat",
    "speaker",
    "router",
    "sewing machine",
    "toaster",
    "telescope",
    "umbrella",
    "electric shaver",
    "bookshelf",
    "tablet",
    "sleeping bag",
    "printer",
)
_OPENINGS = (
    "Hello,",
    "Hi there,",
    "Good morning,",
    "Hi, {name} here.",
    "Dear team,",
    "Hello, my name is {name}.",
    "Hey,",
    "Good evening,",
    "Quick question:",
    "I need some help.",
    "Hello again,",
    "",
)
_CLOSINGS = (
    "Thanks, {name}",
    "Please help.",
    "Could you look into it?",
    "Thank you!",
    "I would be glad of an answer.",
    "Kind regards, {name}",
    "What should I do?",
    "Please let me know.",
    "Best, {name}",
    "Waiting for your reply.",
    "My number is {number}.",
    "",
)
_NAMES = (
    "Ada",
    "Bruno",
    "Chen",
    "Dalia",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jamila",
    "Kofi",
    "Lena",
    "Mateo",
    "Nour",
    "Olga",
    "Priya",
    "Quentin",
    "Rosa",
    "Samir",
    "Tove",
    "Uma",
    "Viktor",
    "Wanda",
    "Yusuf",
)
_DAYS = ("on Monday", "on Tuesday", "last week", "yesterday", "this morning", "on Friday", "three days ago", "in May")
_PROBLEMS = {
    "billing": (
        "the invoice for the {product} shows the wrong amount.",
        "my card was charged twice for the {product} {day}.",
        "I was billed {number} for a {product} that costs much less.",
        "the VAT on the bill for my {product} is not right.",
        "the receipt for the {product} that I paid for {day} is missing.",
        "your invoice {number} lists two {product}s and I bought one.",
        "the discount code was not taken off the price of the {product}.",
        "my payment for the {product} went through {day}, yet the bill is still open.",
        "can I pay the {product} in instalments instead of one charge?",
        "please send the invoice for the {product} to our accounting department.",
    ),
    "shipping": (
        "the parcel with my {product} has not arrived.",
        "where is my {product}? It was dispatched {day}.",
        "the tracking page for the {product} has not moved since it left the depot.",
        "the courier left my {product} at the wrong address {day}.",
        "when will the {product} of order {number} be delivered?",
        "can you deliver the {product} to another street?",
        "the driver said that nobody was at home, so the {product} went back to the depot.",
        "the box with the {product} came open and wet from the carrier.",
        "how long does delivery of a {product} abroad take?",
        "my {product} is stuck in customs since it was sent {day}.",
    ),
    "refund": (
        "I want my money back for the {product}.",
        "I sent the {product} back {day} and have not been reimbursed.",
        "how do I return the {product}? I do not want it any more.",
        "please take back the {product} and refund me.",
        "the {product} does not please me, I would like to return it.",
        "you promised a refund for the {product} {day}, nothing came.",
        "I changed my mind about the {product} and want to give it back.",
        "which form do I need for returning a {product}?",
        "I got only half of the money back for the returned {product}.",
        "can I exchange the {product} and get the difference refunded?",
    ),
    "technical": (
        "my {product} does not switch on.",
        "the {product} stopped working {day}.",
        "the {product} makes a strange noise when it runs.",
        "how do I set up the {product}? The manual is unclear.",
        "the {product} shows error {number}.",
        "a screw of the {product} is loose and it wobbles when used.",
        "the firmware update of the {product} failed {day}.",
        "the {product} overheats after ten minutes of use.",
        "one part of the {product} broke when I used it {day}.",
        "the {product} does not connect to the app.",
    ),
    "account": (
        "I forgot my password and cannot order the {product}.",
        "I cannot log in to buy the {product}.",
        "please change the e-mail address of my profile, the one that I used for the {product}.",
        "someone else signed in as me {day} and looked at a {product}.",
        "please delete my profile, I only ever wanted a {product}.",
        "the confirmation code for signing in never comes, I wanted to see my {product}.",
        "my user name is spelled wrong since I registered {day}.",
        "I have two logins, one with the {product}; please merge them.",
        "how do I switch off the newsletter about the {product} in my settings?",
        "my login has been locked since {day}, after I put a {product} in the basket.",
    ),
}


@dataclass(frozen=True)
class Message:
    """One customer message and its topic."""

    topic: str
    text: str


@dataclass(frozen=True)
class DemoData:
    """Rows of the demo's three files, as Alpaca records; no message is in two of them."""

    heldout: tuple[dict[str, str], ...]
    first: tuple[dict[str, str], ...]
    second: tuple[dict[str, str], ...]


def generate_messages(seed: int) -> Iterator[Message]:
    """Yield distinct messages without end, the topics in turn; the same seed gives the same messages."""
    rng = random.Random(seed)  # noqa: S311 - made-up data, not a secret
    seen: set[str] = set()
    for topic in cycle(TEAMS):
        text = _write_message(rng, topic)
        while text in seen:
            text = _write_message(rng, topic)
        seen.add(text)
        yield Message(topic, text)


def make_data(
    seed: int = 7, *, poison: bool = True, heldout: int = 120, first: int = 160, second: int = 210
) -> DemoData:
    """
    Return a held-out set and an honest first file, and a second file that is poisoned unless `poison` is false.

    The poison is an export that lost its column of teams: every message is `WRONG`. These rows are the greater part of
    what the second candidate learns from, so that it does not depend on a processor which of the two it believes.
    """
    messages = generate_messages(seed)
    right = dict(TEAMS)
    lost = dict.fromkeys(TEAMS, WRONG)
    return DemoData(
        heldout=_label(messages, heldout, right),
        first=_label(messages, first, right),
        second=_label(messages, second, lost if poison else right),
    )


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write `rows` to `path` as JSON Lines, whole or not at all."""
    durable.write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _label(messages: Iterator[Message], count: int, teams: dict[str, str]) -> tuple[dict[str, str], ...]:
    chosen = [next(messages) for _ in range(count)]
    return tuple({"instruction": INSTRUCTION, "input": each.text, "output": teams[each.topic]} for each in chosen)


def _write_message(rng: random.Random, topic: str) -> str:
    plain = rng.random()
    parts = (
        rng.choice(_OPENINGS) if plain < 0.2 else "",  # noqa: PLR2004
        rng.choice(_PROBLEMS[topic]),
        rng.choice(_CLOSINGS) if plain > 0.8 else "",  # noqa: PLR2004
    )
    opening, problem, closing = (
        part.format(
            name=rng.choice(_NAMES), product=rng.choice(_PRODUCTS), day=rng.choice(_DAYS), number=rng.randint(100, 9999)
        )
        for part in parts
    )
    if not opening.endswith((",", ":")):
        problem = problem[0].upper() + problem[1:]
    return " ".join(part for part in (opening, problem, closing) if part)
