"""
Read the turns of a row: Alpaca's `system` and `history`, OpenAI's `messages`, ShareGPT's `conversations`.

A row's form follows from its key; a system message comes first, then questions and answers in turn, the last of them an
answer. Nothing is repaired: what a trainer would have to guess is a fault.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.models.template import fold

#: What is wrong with a row beyond its schema: turn from 1, if one is meant, rule, message and remedy.
Fault = tuple[int | None, str, str, str]
#: Most turns of a conversation. Each answer is a record with all turns before it: memory grows with the square.
MOST_TURNS = 300
#: Longest first question, in characters, that may be a greeting.
_GREETING = 40
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
}
TOOL_ROLES = frozenset({"tool", "function", "observation", "function_call", "tool_call", "ipython"})
#: Keys of a row or a turn that change what is to be learned, unless they are empty.
UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), "tool calls are"),
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "images, videos and audio are"),
    **dict.fromkeys(("chosen", "rejected", "preferred_output", "non_preferred_output"), "preference pairs are"),
    **dict.fromkeys(("kto_tag", "label", "train"), "marks of learned turns, other than weight, are"),
}
#: Also an empty list as text, under any key: so LLaMA-Factory writes that a row has no tools.
_EMPTY: tuple[object, ...] = (None, "", [], {}, "[]")


class Form(NamedTuple):
    """One form of a row: its name, its schema, and the keys of a turn."""

    name: str
    schema: str
    role: str = ""
    text: str = ""


#: The forms by the key that tells them.
FORMS: Mapping[str, Form] = {
    "instruction": Form("Alpaca", "alpaca-record.schema.json"),
    "messages": Form("OpenAI messages", "messages-record.schema.json", "role", "content"),
    "conversations": Form("ShareGPT", "sharegpt-record.schema.json", "from", "value"),
}


class Conversation(NamedTuple):
    """The turns of a row as role and text, the indices of the answers that are learned, and unused keys of turns."""

    turns: Sequence[tuple[str, str]]
    learned: frozenset[int]
    unknown: tuple[str, ...] = ()

    @property
    def opening(self) -> tuple[str, ...]:
        """
        The texts that a conversation begins with, which stay when it is continued: system message and first exchange.

        After a first question of at most 40 characters, which may be a greeting, also those of the second exchange, if
        any.
        """
        begin = self.turns[0][0] == "system"
        exchanges = 1 if len(self.turns[begin][1]) > _GREETING else 2
        return tuple(text for _, text in self.turns[: begin + 2 * exchanges])


def form_key(row: Mapping[str, Any]) -> str:
    """Return the first key of `FORMS` that a row has, which tells its form; `instruction` if it has none."""
    for key in FORMS:
        if key in row:
            return key
    return "instruction"


def unsupported(value: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a row or a turn that are `UNSUPPORTED` and not empty; `label` only if it is true or false."""
    found = (key for key in value if key in UNSUPPORTED and value[key] not in _EMPTY)
    return (key for key in found if key != "label" or isinstance(value[key], bool))


def unsupported_key(name: str, turn: int | None = None) -> Fault:
    """Return the fault of a key of `unsupported` in a row or a turn."""
    message = f'"{name}": {UNSUPPORTED[name]} not supported'
    return (turn, "unsupported", message, "leave the row out, or the key if it means nothing")


def alpaca_turns(row: Mapping[str, Any]) -> Conversation | None:
    """Return an Alpaca row's turns, all answers learned, or `None` for a bad `system` or `history`; checks no other."""
    history, turns = row.get("history", []), _system(row)
    if turns is None or not isinstance(history, list) or len(history) * 2 > MOST_TURNS:
        return None
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_text, pair)):  # noqa: PLR2004
            return None
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns += [("user", fold(row["instruction"], row.get("input", ""))), ("assistant", row["output"])]
    return Conversation(turns, frozenset(range(len(turns) - 1, 0, -2)))


def message_turns(row: Mapping[str, Any], key: str) -> Conversation | None:
    """Return the turns of a row with the messages `key`; `None` if they break the form's schema. See `turn_faults`."""
    form, given, turns = FORMS[key], row[key], _system(row)
    if turns is None or not isinstance(given, list) or not 0 < len(given) <= MOST_TURNS:
        return None
    learned: set[int] = set()
    unknown: dict[str, None] = {}
    for turn in given:
        role, text = (turn.get(form.role), turn.get(form.text)) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str) or not text.strip():
            return None
        if len(turn) > 2:  # noqa: PLR2004 - role and text
            weight = turn.get("weight")
            if isinstance(weight, bool) or weight not in (0, 1, None):
                return None
            unknown.update((f"{key}.{name}", None) for name in turn if name not in {form.role, form.text, "weight"})
        if ROLES[role] == "assistant" and turn.get("weight") != 0:
            learned.add(len(turns))
        turns.append((ROLES[role], text))
    return Conversation(turns, frozenset(learned), tuple(unknown))


def turn_faults(conversation: Conversation, given: Sequence[Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield faults of the messages `given` that the schema allows: unsupported keys, wrong order, none learned."""
    for number, turn in enumerate(given, 1):
        if len(turn) > 2:  # noqa: PLR2004 - role and text
            yield from (unsupported_key(name, number) for name in unsupported(turn))
    before = None
    turns = conversation.turns
    for number, (role, _) in enumerate(turns, len(given) - len(turns) + 1):
        if role == "system" and before is not None:
            yield (number, "role", "a system message stands after other turns", "put it first, and only one")
            continue
        if role == before:
            who = "the user" if role == "user" else "the assistant"
            yield (number, "role", f"two turns of {who} follow each other", "join them, or add the turn between")
        elif role == "assistant" and before in {None, "system"}:
            message = "the assistant's turn has no question before it"
            yield (number, "role", message, "begin with the user's turn, after a system message if there is one")
        before = role
    if before != "assistant":
        message = "the last turn is not the assistant's"
        yield (len(given), "role", message, "end with the answer that the model should give, or leave the turn out")
    elif not conversation.learned:
        message = "no answer of the conversation is learned: all have the weight 0"
        yield (None, "weight", message, "leave the row out, or give an answer the weight 1")


def texts_of(row: Mapping[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """Yield (key, turn, text) of each text that a model reads, of 300 turns at most; turns are from 1, or `None`."""
    key = form_key(row)
    for name in ("instruction", "input", "output", "system") if key == "instruction" else ("system",):
        if isinstance(row.get(name), str):
            yield name, None, row[name]
    key, text_key = ("history", "") if key == "instruction" else (key, FORMS[key].text)
    turns = row.get(key)
    for number, turn in enumerate(turns[:MOST_TURNS] if isinstance(turns, list) else (), 1):
        for text in (turn.get(text_key),) if isinstance(turn, dict) else turn[:2] if isinstance(turn, list) else ():
            if isinstance(text, str):
                yield key, number, text


def _system(row: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    text = row.get("system", "")
    return None if not isinstance(text, str) else [("system", text)] if text.strip() else []


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
