"""
How rows of other formats become records: each a jq program, with what it loses.

A program reads JSON Lines and one JSON array alike, and leaves out what would be no record: `dropforge check` accepts
all that it writes, but for what only a base model or the settings object to.
"""

from collections.abc import Mapping
from typing import Any

_ROWS = 'if type == "array" then .[] else . end | objects'
_KEEP = 'select(all(type == "string") and ([.instruction, .output] | all(test("\\\\S"))))'
_LOST = "system messages, later turns, and rows that begin otherwise are lost"
#: Lists of parts that are texts alone.
_PARTS = 'map_values(if type == "array" and all(.type == "text") then map(.text) | join("\\n") else . end)'
_FIRST_PAIR = (
    "arrays | map(select(.{who} | IN({left_out}) | not)) "
    "| select([.[0].{who}, .[1].{who}] | IN({pairs})) | {{instruction: .[0].{says}, output: .[1].{says}}}"
)
_SHAREGPT = _FIRST_PAIR.format(
    who="from", says="value", left_out='"system"', pairs='["human", "gpt"], ["user", "assistant"]'
)
_OPENAI = _FIRST_PAIR.format(
    who="role", says="content", left_out='"system", "developer"', pairs='["user", "assistant"]'
)


def command(program: str) -> str:
    """Return the command that makes records of a file's rows by a jq program."""
    return f"jq -c '{_ROWS} | {program} | {_KEEP}' FILE > NEW.jsonl"


def other_format(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the key that identifies another format, the format's name, and how its rows become records."""
    if "instruction" in row:
        return None
    if "conversations" in row:
        words = f"its first question and the answer become a record; {_LOST}"
        return "conversations", "a ShareGPT conversation", f"{words}: {command(f'.conversations | {_SHAREGPT}')}"
    if "messages" in row:
        words = f"its first user message and the answer become a record; {_LOST}"
        return "messages", "an OpenAI chat", f"{words}: {command(f'.messages | {_OPENAI} | {_PARTS}')}"
    return None
