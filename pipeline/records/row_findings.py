"""Find what is wrong with one row, each fault with a message and a remedy; jsonschema judges by the schema."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

from pipeline.records.conversation import (
    FORMS,
    MOST_TURNS,
    ROLES,
    TOOL_ROLES,
    Form,
    form_key,
    message_turns,
    texts_of,
    turn_faults,
    unsupported,
    unsupported_key,
)
from pipeline.records.fast_path import KEYS, MOST_KEYS
from pipeline.records.records import KNOWN, LONGEST_TAG, MOST_TAGS, Finding, Record, Row, misnamed_key
from pipeline.words import printable

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

KEY_WIDTH = _VALUE_WIDTH = 60
#: Control characters that a text must not have.
_UNWANTED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def row_findings(row: Row, records: Sequence[Record], special: re.Pattern[str] | None) -> list[Finding]:
    """Return the findings about a row, none if it is good; `records` is the result of `records_of` for it."""
    findings = [] if records else schema_findings(row)
    faults = _text_faults(row.value, special)
    return findings + [_finding(row, field, *fault).model_copy(update={"turn": turn}) for field, turn, *fault in faults]


def schema_findings(row: Row) -> list[Finding]:
    """
    Return a row's findings: by the schema of its form, for misnamed and unsupported keys, for the order of turns.

    The order of turns is checked only if nothing else is wrong. If a row has too many keys, or a list of rows under
    another key, that is the only finding.
    """
    value = row.value
    if not isinstance(value, dict):
        return [_worded(row, error) for error in _schema("instruction").iter_errors(value)]
    if len(value) > MOST_KEYS:
        message, remedy = f"the record has more than {MOST_KEYS:,} keys", "keep instruction, input and output alone"
        return [_finding(row, None, "maxproperties", message, remedy)]
    key = form_key(value)
    known = {name: value[name] for name in value.keys() & KNOWN[key]}
    for name, most in {"tags": MOST_TAGS, "history": MOST_TURNS // 2, key: MOST_TURNS}.items():
        if isinstance(known.get(name), list):
            # One too many is enough to be told of.
            known[name] = known[name][: most + 1]
    if key not in value and any(map(_is_list_of_rows, value.values())):
        remedy = "write each of its rows on one line: jq -c '.[] | arrays[]' FILE > NEW"
        return [_finding(row, None, "json", "the line is an object that holds a list of rows", remedy)]
    findings = [_worded(row, error) for error in _schema(key).iter_errors(known)]
    findings += [_finding(row, name, *unsupported_key(name)[1:]) for name in unsupported(value)]
    if key != "instruction":
        return findings or _turn_findings(row, key)
    if (near := misnamed_key(value, "input")) is not None:
        name = printable(near[:KEY_WIDTH])
        remedy = 'did you mean "input"? rename the key, or leave it out'
        findings.append(_finding(row, "input", "misnamed_key", f'"{name}" is not a key of a record', remedy))
    return findings


def _text_faults(value: Any, special: re.Pattern[str] | None) -> Iterator[tuple[str, int | None, str, str, str]]:
    """
    Yield (field, turn, rule, message, remedy) for each text of a row with a control character or a `special` token.

    Tab and line breaks are allowed. Only the first of each kind in a text is named. Values that are no object or no
    text are skipped.
    """
    texts = list(texts_of(value)) if isinstance(value, dict) else []
    whole = "\n".join(text for _, _, text in texts)
    if _UNWANTED.search(whole) is None and (special is None or special.search(whole) is None):
        return
    for field, turn, text in texts:
        control = _UNWANTED.search(text)
        if control is not None:
            what = f"{field} holds the control character U+{ord(control[0]):04X}"
            yield field, turn, "control_character", what, "take it out: of these only tab and line breaks are text"
        token = None if special is None else special.search(text)
        if token is not None:
            name = printable(token[0][:KEY_WIDTH])
            what = f"{field} holds {name}, a special token of the base model's tokenizer"
            yield field, turn, "special_token", what, "take it out: it could end or forge a turn of the conversation"


def _is_list_of_rows(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not FORMS.keys().isdisjoint(value[0])
    )


def _turn_findings(row: Row, key: str) -> list[Finding]:
    conversation = message_turns(row.value, key)
    faults = () if conversation is None else turn_faults(conversation, row.value[key])
    return [_finding(row, key, *fault).model_copy(update={"turn": turn}) for turn, *fault in faults]


@cache
def _schema(key: str) -> "Draft202012Validator":
    """Return the validator of a form of `FORMS`, built once; its registry is empty, so that nothing is ever fetched."""
    from importlib import resources  # noqa: PLC0415 - a quick start: most files have no row that it is needed for

    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415

    text = resources.files("schemas").joinpath(FORMS[key].schema).read_text(encoding="utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    registry: Registry[Any] = Registry()
    return Draft202012Validator(schema, registry=registry)


def _worded(row: Row, error: "ValidationError") -> Finding:
    """Convert a jsonschema error to a finding with our message, since jsonschema's repeats the value."""
    field = str(error.path[0]) if error.path else None
    value = reduce(getitem, error.absolute_path, row.value)
    if field in {"history", "messages", "conversations"}:
        return _worded_turn(row, field, error, value)
    if error.validator == "required":
        # The schema gives an error for each missing key, which its message begins with.
        return _missing_finding(row, next(key for key in KEYS if error.message.startswith(repr(key))))
    if field == "tags":
        allowed = f"at most {MOST_TAGS} texts of 1 to {LONGEST_TAG} characters"
        message = f"tags are not {allowed}, none blank or with control characters"
        return _finding(row, field, str(error.validator).lower(), message, 'write "tags": ["one", "two"]')
    if error.validator == "pattern":
        return _finding(row, field, "blank", f"{field} is blank", f"write the {field}, or leave the row out")
    if field is None:
        remedy = 'write {"instruction": ..., "input": ..., "output": ...}'
        return _type_finding(row, None, "a record is an object, this is {}", remedy, value)
    if value is None and field in {"input", "group", "system"}:
        remedy = "use an empty string or leave it out"
    elif value is None or isinstance(value, list | dict):
        remedy = f"write the {field} as one text"
    else:
        remedy = "put it in quotes"
    return _type_finding(row, field, f"{field} is {{}}, not a text", remedy, value)


def _worded_turn(row: Row, key: str, error: "ValidationError", value: object) -> Finding:
    """Convert an error below the key of a conversation, `history` or one of `FORMS`, to a finding."""
    form, rule, turn = FORMS.get(key, FORMS["messages"]), str(error.validator).lower(), None
    if len(error.path) > 1:
        turn = int(error.path[1]) + 1
        found = _pair_fault(row, rule) if key == "history" else _message_fault(row, form, error, value)
    elif rule in {"minitems", "maxitems"}:
        words, more = ("no turn", "") if rule == "minitems" else (f"more than {MOST_TURNS:,} turns", ", or split it")
        found = _finding(row, None, rule, f"the conversation has {words}", f"leave the row out{more}")
    else:
        remedy = "use an empty list or leave it out" if key == "history" else "write it as a list of turns"
        found = _type_finding(row, None, f"{key} is {{}}, not a list", remedy, value)
    return found.model_copy(update={"field": key, "turn": turn})


def _pair_fault(row: Row, rule: str) -> Finding:
    message = "a turn of history is not a question and an answer, both texts that are not blank"
    return _finding(row, None, rule, message, 'write each turn as ["question", "answer"]')


def _message_fault(row: Row, form: Form, error: "ValidationError", value: object) -> Finding:
    """Return the finding about one message, without its turn."""
    name, rule = error.path[-1], str(error.validator).lower()
    shape = f'write each turn as {{"{form.role}": ..., "{form.text}": ...}}'
    if isinstance(name, int) and rule == "type":
        return _type_finding(row, None, "a turn is {}, not an object", shape, value)
    if rule == "required":
        name = form.role if error.message.startswith(repr(form.role)) else form.text
        return _finding(row, None, "missing", f"{name} is missing", shape)
    if rule == "pattern":
        return _finding(row, None, "blank", f"{name} is blank", "write the turn, or leave the row out")
    if name == "weight":
        return _finding(row, None, "weight", "weight is neither 0 nor 1", "write 1, or 0 for an answer not to learn")
    if rule == "enum" and isinstance(value, str):
        return _role_fault(row, value)
    return _type_finding(row, None, f"{name} is {{}}, not a text", shape, value)


def _role_fault(row: Row, role: str) -> Finding:
    if role in TOOL_ROLES:
        return _finding(row, None, "unsupported", "turns of tools are not supported", "leave the row out")
    message, known = f'the role "{printable(role[:KEY_WIDTH])}" is not known', ", ".join(ROLES)
    found = _finding(row, None, "role", message, f"use one of {known}")
    return found.model_copy(update={"bare": "a role is not known"})


def _missing_finding(row: Row, field: str) -> Finding:
    near = misnamed_key(row.value, field)
    if near is None:
        return _finding(row, field, "missing", f"{field} is missing", f'add the key "{field}" with a text')
    name = printable(near[:KEY_WIDTH])
    remedy = f'did you mean "{field}"? rename the key "{name}"'
    return _finding(row, field, "misnamed_key", f'{field} is missing, but there is "{name}"', remedy)


def _finding(row: Row, field: str | None, rule: str, message: str, remedy: str) -> Finding:
    return Finding(line=row.line, field=field, rule=rule, message=message, remedy=remedy)


def _type_finding(row: Row, field: str | None, message: str, remedy: str, value: object) -> Finding:
    """Return the finding about a value of the wrong type; {} in `message` is replaced, as by `a number: 12`."""
    match value:
        case str():
            kind, quoted = "a text", f': "{printable(value[:_VALUE_WIDTH])}{"…" * (len(value) > _VALUE_WIDTH)}"'
        case bool():
            kind, quoted = "true or false", f": {json.dumps(value)}"
        case int() | float():
            kind, quoted = "a number", f": {str(value)[:_VALUE_WIDTH]}"
        case _:
            kind, quoted = "an object" if isinstance(value, dict) else "a list" if value is not None else "null", ""
    finding = _finding(row, field, "type", message.format(kind + quoted), remedy)
    return finding.model_copy(update={"bare": message.format(kind)})
